"""Feature pyramids F_1..F_L of Eq. 1-2: any timm backbone, brought to strides 4, 8, 16 and 32.

Its weights come from timm's hub or from a file: safetensors, or a torch file opened without running any code in it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd._files import open_regular
from pixnet_sd._util import logger
from pixnet_sd.errors import CheckpointError, PixNetError
from pixnet_sd.geometry import STRIDES

_PREFIXES = re.compile(r"^((module|model|resnet|encoder|backbone|body)\.)+")
_MOST_TIMES = 32  # the encoder's size: files of self-supervised training hold two networks, heads and moments
_BESIDE_BYTES = 1 << 30
_MIN_MATCHED = 0.5  # a head is a small part of a backbone; half unmatched means another network
_HUB_TIMEOUT_S = 5.0

_FIXED_SIZE = (
    "Encoder {name!r} does not take images of any size: {reason}. Choose a ConvNet or a plain ViT, such as 'resnet18', "
    "'convnext_tiny' or 'vit_small_patch16_224'."
)


class Encoder(nn.Module):
    """A timm feature extractor whose maps have strides 4, 8, 16 and 32.

    `channels` are those of the four maps. `mean` and `std`, which normalise RGB on a scale of 0 to 1, belong to the
    weights and are saved with them. A frozen encoder keeps weights and batch-norm statistics as they are. The input of
    a ViT is resampled to a multiple of its patches' side, `patch_px` (None for ConvNets).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        frozen: bool = False,
        patch_px: int | None = None,
    ) -> None:
        super().__init__()
        self.body, self.channels, self.patch_px, self.frozen = body, tuple(channels), patch_px, frozen
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))
        if frozen:
            self.body.requires_grad_(False)

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; a frozen body stays in evaluation mode, so that batch-norm statistics do not move."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute F_1..F_4, each (B, C_l, H / s_l, W / s_l), of RGB (B, 3, H, W), 0 to 255, sides multiples of 32."""
        x = (image / 255 - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return list(self.body(x)) if self.patch_px is None else self._vit(x, self.patch_px)

    def _vit(self, x: Tensor, patch_px: int) -> list[Tensor]:
        """Resample maps of one stride at several depths: shallow ones to fine strides, deep ones to coarse strides."""
        height, width = x.shape[-2:]
        fitted = [-(-size // patch_px) * patch_px for size in (height, width)]
        if fitted != [height, width]:
            x = functional.interpolate(x, fitted, mode="bilinear", align_corners=False)
        return [
            functional.interpolate(level, (height // s, width // s), mode="bilinear", align_corners=False)
            for level, s in zip(self.body(x), STRIDES, strict=True)
        ]


def build_encoder(name: str = "resnet18", weights: str | Path | None = "imagenet", *, frozen: bool = False) -> Encoder:
    """Build an encoder of a timm model, a ConvNet with maps at strides 4 to 32 or a ViT, in training mode.

    `weights` are ``"imagenet"`` (timm's own, fetched from its hub), None (random), or a safetensors or torch file.
    PixNetError for a model that timm does not know or that does not fit, CheckpointError for weights.
    """
    info: Any = _probe(name).feature_info
    strides: list[int] = info.reduction()
    if is_vit := len(set(strides)) == 1:
        depth, n_levels = len(info.info), len(STRIDES)
        indices = [round((k + 1) * depth / n_levels) - 1 for k in range(n_levels)]
        options: dict[str, Any] = {"out_indices": indices, "dynamic_img_size": True}
        try:
            _probe(name, **options)
        except TypeError as error:
            raise PixNetError(_FIXED_SIZE.format(name=name, reason=f"it fails ({error})")) from error
    elif missing := [s for s in STRIDES if s not in strides]:
        raise PixNetError(
            f"Encoder {name!r} has feature maps at strides {strides}, and {missing} are missing. "
            "Choose a timm backbone with maps at 4, 8, 16 and 32, such as 'resnet18' or 'convnext_tiny'."
        )
    else:
        options = {"out_indices": [strides.index(s) for s in STRIDES]}
    from_hub = str(weights) == "imagenet"
    body = _from_hub(name, options) if from_hub else timm.create_model(name, features_only=True, **options)
    if weights is not None and not from_hub:
        _load_weights(body, weights)
    cfg = timm.get_pretrained_cfg(name)
    mean, std = (cfg.mean, cfg.std) if cfg is not None else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    channels: list[int] = body.feature_info.channels()  # type: ignore[union-attr, operator]
    encoder = Encoder(body, channels, mean, std, frozen=frozen, patch_px=strides[0] if is_vit else None)
    _check_any_size(encoder, name)
    return encoder


def _probe(name: str, **options: Any) -> nn.Module:
    """Make the model without its weights in memory, to ask what it has."""
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise PixNetError(f"timm knows no model named {name!r}. Some that it knows: {close}. Check encoder=.")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what timm says of a model on the meta device does not concern a user
        return timm.create_model(name, features_only=True, **options)


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    """Make the model with timm's own weights; asks the hub once first, where timm would retry for a minute."""
    cfg = timm.get_pretrained_cfg(name)
    try:
        if cfg is not None and cfg.hf_hub_id:
            files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
            if not any(isinstance(huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, f), str) for f in files):
                huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
        return timm.create_model(name, pretrained=True, features_only=True, **options)
    except Exception as error:  # the client's differ between versions
        raise CheckpointError(
            f"The ImageNet weights of {name!r} could not be fetched from timm's hub ({type(error).__name__}). Without "
            "a network give encoder_weights= a path to a safetensors or torch file of weights, or "
            "encoder_weights=None to train from scratch."
        ) from error


@torch.no_grad()
def _check_any_size(encoder: Encoder, name: str) -> None:
    """Try an image of a size that no backbone was made for: some take only their own."""
    height, width = 2 * STRIDES[-1], 3 * STRIDES[-1]
    try:
        shapes = [tuple(x.shape[1:]) for x in encoder.eval()(torch.zeros(1, 3, height, width))]
        wanted = [(c, height // s, width // s) for c, s in zip(encoder.channels, STRIDES, strict=True)]
        reason = "" if shapes == wanted else f"it gives maps {shapes} where {wanted} are needed"
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = f"it fails ({error})"
    if reason:
        raise PixNetError(_FIXED_SIZE.format(name=name, reason=f"at {height} × {width} px {reason}"))
    encoder.train()


# Weights of a file


def _load_weights(body: nn.Module, path: str | Path) -> None:
    """Load a file's weights into a timm feature extractor, and log what matched.

    Prefixes are passed over (the pathology SimCLR ResNet18 of Ciga et al., Lightning and DataParallel files have them),
    and so is a classifier head. CheckpointError where less than half of the encoder's tensors have a match.
    """
    own = body.state_dict()
    n_bytes = sum(value.numel() * value.element_size() for value in own.values())
    given = _read_weights(path, most_bytes=_MOST_TIMES * n_bytes + _BESIDE_BYTES)
    by_bare = {_bare(key): value for key, value in given.items()}
    candidates = {key: by_bare[bare] for key in own if (bare := _bare(key)) in by_bare}
    fitting = {key: value for key, value in candidates.items() if value.shape == own[key].shape}
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    missing = [key for key in needed if key not in fitting]
    known = {_bare(key) for key in own}
    unused = [key for key in given if _bare(key) not in known]
    n_matched = len(needed) - len(missing)
    if n_matched < _MIN_MATCHED * len(needed):
        raise CheckpointError(
            f"Only {n_matched} of the encoder's {len(needed)} tensors have a match in {str(path)!r} "
            f"({len(candidates) - len(fitting)} of another shape). The file is of another network: it needs e.g. "
            f"{missing[:3]}, and has {unused[:3]}. Set encoder= to the network it was made for."
        )
    body.load_state_dict(fitting, strict=False)
    log = logger.warning if missing else logger.info
    text = "encoder weights %s: %d of %d tensors matched, missing %s, not used %s"
    log(text, Path(path).name, n_matched, len(needed), missing[:5], unused[:5])


def _bare(key: str) -> str:
    """Strip wrapper prefixes off a key, and spell it as timm's feature wrappers do."""
    return _PREFIXES.sub("", key).replace(".", "_")


def _read_weights(path: str | Path, *, most_bytes: int) -> dict[str, Tensor]:
    """Read tensors by key from a safetensors or torch file; a ``state_dict`` (Lightning) or ``model`` is unwrapped."""
    path = Path(path).expanduser()
    try:
        open_regular(path, most_bytes=most_bytes).close()  # before a library opens it, and waits for a pipe
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"There is no weights file at {str(path)!r}. Give encoder_weights= a file.") from error
    except CheckpointError as error:
        raise CheckpointError(f"encoder_weights= cannot be read: {error}") from error
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        # Bytes that are no weights fail in any way. Torch's own text tells how to run a file's code, so it stays out.
        raise CheckpointError(
            f"{str(path)!r} cannot be opened as weights ({type(error).__name__}). A safetensors file, or a torch file "
            "that holds tensors only, is needed; other objects in a torch file are never run."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no named tensors, so it is not a weights file.")
    return tensors


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 over the tensors of a module, names and values, as hex."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
