"""Encoder weights from a file: safetensors, or a torch file opened without running any code in it.

Feature pyramids F_1..F_L of Eq. 1-2: any timm backbone, brought to strides 4, 8, 16 and 32.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from pixnet_sd._files import home_expanded, open_regular
from pixnet_sd._util import logger
from pixnet_sd.errors import CheckpointError, PixNetError
from pixnet_sd.geometry import STRIDES

__all__ = ["STRIDES", "Encoder", "MatchReport", "build_encoder", "hash_weights", "load_encoder_weights", "read_weights"]

_PREFIXES = ("module.", "model.", "resnet.", "encoder.", "backbone.", "body.")
_MOST_TIMES = 32  # of the encoder's size: files of self-supervised training hold two networks, heads and moments
_BESIDE_BYTES = 1 << 30
_MIN_MATCHED = 0.5  # a head is a small part of a backbone; half unmatched means another network


class MatchReport(NamedTuple):
    """What of a weights file fitted the encoder."""

    matched: int
    missing: list[str]
    unused: list[str]
    wrong_shape: list[str]


def read_weights(path: str | Path, *, most_bytes: int | None = None) -> dict[str, Tensor]:
    """Read tensors from a safetensors or torch file.

    Parameters
    ----------
    path
        ``.safetensors``, or any file that ``torch.load(weights_only=True)`` opens; a nested ``state_dict`` (Lightning)
        or ``model`` is unwrapped.
    most_bytes
        Largest size of a file that is opened; None: any.

    Returns
    -------
    Tensors by key.

    Raises
    ------
    CheckpointError
        No such file, or nothing in it that is a set of tensors.
    """
    path = home_expanded(path)
    _check_file(path, most_bytes)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        # Bytes that are no weights fail in any way. Torch's own text tells how to run a file's code, so it stays out.
        raise CheckpointError(
            f"{str(path)!r} cannot be opened as weights ({type(error).__name__}). A safetensors file, or a torch file "
            "that holds tensors only, is needed; other objects in a torch file are never run."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no named tensors, so it is not a weights file.")
    return tensors


def _check_file(path: Path, most_bytes: int | None) -> None:
    """Look at what is there before a library opens it, and waits for a pipe."""
    try:
        open_regular(path, most_bytes=most_bytes).close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"There is no weights file at {str(path)!r}. Give encoder_weights= a file.") from error
    except CheckpointError as error:
        raise CheckpointError(f"encoder_weights= cannot be read: {error}") from error


def _bare(key: str) -> str:
    """A key without wrapper prefixes, and in the spelling that timm's feature wrappers use."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                key, stripped = key[len(prefix) :], True
    return key.replace(".", "_")


def _match(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], MatchReport]:
    by_bare = {_bare(key): value for key, value in found.items()}
    fitting: dict[str, Tensor] = {}
    wrong_shape = []
    for key, value in own.items():
        candidate = by_bare.get(_bare(key))
        if candidate is not None and candidate.shape == value.shape:
            fitting[key] = candidate
        elif candidate is not None:
            wrong_shape.append(key)
    missing = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    known = {_bare(key) for key in own}
    unused = [key for key in found if _bare(key) not in known]
    return fitting, MatchReport(len(fitting), missing, unused, wrong_shape)


def load_encoder_weights(body: nn.Module, path: str | Path) -> MatchReport:
    """Load a file's weights into an encoder body.

    Prefixes such as ``model.``, ``resnet.`` or ``module.`` (the pathology SimCLR ResNet18 of Ciga et al., Lightning
    and DataParallel files) are understood; a classifier head is left out.

    Parameters
    ----------
    body
        timm feature extractor.
    path
        File, see `read_weights`.

    Returns
    -------
    What matched; the same is logged.

    Raises
    ------
    CheckpointError
        Less than half of the encoder's tensors have a match.
    """
    own = body.state_dict()
    n_bytes = sum(value.numel() * value.element_size() for value in own.values())
    fitting, report = _match(own, read_weights(path, most_bytes=_MOST_TIMES * n_bytes + _BESIDE_BYTES))
    needed = [k for k in own if not k.endswith("num_batches_tracked")]
    share = 1 - len(report.missing) / len(needed)
    if share < _MIN_MATCHED:
        raise CheckpointError(
            f"Only {len(needed) - len(report.missing)} of the encoder's {len(needed)} tensors have a match in "
            f"{str(path)!r} ({len(report.wrong_shape)} of another shape). The file is of another network: it needs "
            f"e.g. {report.missing[:3]}, and has {report.unused[:3]}. Set encoder= to the network it was made for."
        )
    body.load_state_dict(fitting, strict=False)
    level = logger.info if not report.missing else logger.warning
    level(
        "encoder weights %s: %d of %d tensors matched, missing %s, not used %s",
        Path(path).name,
        len(needed) - len(report.missing),
        len(needed),
        report.missing[:5],
        report.unused[:5],
    )
    return report


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over the tensors of a module, names and values, as hex."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


N_VIT_LEVELS = 4
HUB_TIMEOUT_S = 5.0

_OFFLINE_HELP = (
    "The ImageNet weights of {name!r} could not be fetched from timm's hub ({reason}). Without a network give "
    "encoder_weights= a path to a safetensors or torch file of weights, or encoder_weights=None to train from scratch."
)
_FIXED_SIZE = (
    "Encoder {name!r} does not take images of any size: {reason}. Choose a ConvNet or a plain ViT, such as 'resnet18', "
    "'convnext_tiny' or 'vit_small_patch16_224'."
)


class Encoder(nn.Module):
    """A timm feature extractor whose maps have strides 4, 8, 16 and 32.

    Parameters
    ----------
    body
        A timm model made with ``features_only=True``.
    channels
        Channels of the four maps.
    mean, std
        Input normalisation per RGB channel, on a scale of 0 to 1. It belongs to the weights and is saved with them.
    frozen
        Keep the weights and the batch-norm statistics as they are.
    patch_px
        Side of a ViT's patches, to whose multiple the input is resampled; None for ConvNets.
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
        self.body = body
        self.channels = tuple(channels)
        self.patch_px = patch_px
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.frozen = frozen
        if frozen:
            self.body.requires_grad_(False)

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; a frozen body stays in evaluation mode, so that batch-norm statistics do not move."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute the pyramid.

        Parameters
        ----------
        image
            RGB, shape (B, 3, H, W), 0 to 255, H and W multiples of 32.

        Returns
        -------
        F_1..F_4, shapes (B, C_l, H / s_l, W / s_l) for strides 4, 8, 16, 32.
        """
        x = (image / 255 - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._convnet(x) if self.patch_px is None else self._vit(x, self.patch_px)

    def _convnet(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x))

    def _vit(self, x: Tensor, patch_px: int) -> list[Tensor]:
        """One stride at several depths: shallow maps are resampled to fine strides, deep ones to coarse strides."""
        height, width = x.shape[-2:]
        fitted = [-(-size // patch_px) * patch_px for size in (height, width)]
        if fitted != [height, width]:
            x = functional.interpolate(x, fitted, mode="bilinear", align_corners=False)
        return [
            functional.interpolate(level, (height // s, width // s), mode="bilinear", align_corners=False)
            for level, s in zip(self.body(x), STRIDES, strict=True)
        ]


def _require_hub(name: str) -> None:
    """Fail within seconds when the weights are not cached and the hub does not answer; timm would retry for a minute.

    Raises
    ------
    CheckpointError
        No answer.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        raise CheckpointError(_OFFLINE_HELP.format(name=name, reason=type(error).__name__)) from error


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    if pretrained:
        _require_hub(name)
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except Exception as error:
        if pretrained:
            # Whatever the hub client raises (it differs between versions), the cause for a user is the same.
            raise CheckpointError(_OFFLINE_HELP.format(name=name, reason=type(error).__name__)) from error
        raise


def _is_vit(probe: nn.Module) -> bool:
    return len(set(probe.feature_info.reduction())) == 1  # type: ignore[union-attr, operator]


def _convnet_body(name: str, probe: nn.Module, *, pretrained: bool) -> nn.Module:
    reductions: list[int] = probe.feature_info.reduction()  # type: ignore[union-attr, operator]
    missing = [s for s in STRIDES if s not in reductions]
    if missing:
        raise PixNetError(
            f"Encoder {name!r} has feature maps at strides {reductions}, and {missing} are missing. "
            "Choose a timm backbone with maps at 4, 8, 16 and 32, such as 'resnet18' or 'convnext_tiny'."
        )
    return _create(name, pretrained=pretrained, out_indices=[reductions.index(s) for s in STRIDES])


def _vit_body(name: str, probe: nn.Module, *, pretrained: bool) -> nn.Module:
    depth = len(probe.feature_info.info)  # type: ignore[union-attr, arg-type]
    indices = [round((k + 1) * depth / N_VIT_LEVELS) - 1 for k in range(N_VIT_LEVELS)]
    options = {"out_indices": indices, "dynamic_img_size": True}
    try:
        _probe(name, **options)
    except TypeError as error:
        raise PixNetError(_FIXED_SIZE.format(name=name, reason=f"it fails ({error})")) from error
    return _create(name, pretrained=pretrained, **options)


def _probe(name: str, **options: Any) -> nn.Module:
    """The model without its weights in memory, to ask it what it has."""
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise PixNetError(f"timm knows no model named {name!r}. Some that it knows: {close}. Check encoder=.")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what timm says of a model on the meta device does not concern a user
        return _create(name, pretrained=False, **options)


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


def build_encoder(name: str = "resnet18", weights: str | Path | None = "imagenet", *, frozen: bool = False) -> Encoder:
    """Build an encoder.

    Parameters
    ----------
    name
        A timm model: a ConvNet with maps at strides 4 to 32, or a ViT.
    weights
        ``"imagenet"`` (timm's default weights, fetched from its hub), None (random), or a path to a safetensors or
        torch file (see `load_encoder_weights`).
    frozen
        Keep weights and batch-norm statistics fixed.

    Returns
    -------
    The encoder, in training mode.

    Raises
    ------
    PixNetError
        timm does not know the model, its strides do not fit, or it takes images of one size only.
    CheckpointError
        The weights cannot be fetched, opened or matched.
    """
    probe = _probe(name)
    hub = str(weights) == "imagenet"
    vit = _is_vit(probe)
    body = (_vit_body if vit else _convnet_body)(name, probe, pretrained=hub)
    if weights is not None and not hub:
        load_encoder_weights(body, weights)
    patch_px = body.feature_info.reduction()[0] if vit else None  # type: ignore[union-attr, operator]
    cfg = timm.get_pretrained_cfg(name)
    mean, std = (cfg.mean, cfg.std) if cfg is not None else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    encoder = Encoder(
        body,
        body.feature_info.channels(),  # type: ignore[union-attr, operator]
        mean,
        std,
        frozen=frozen,
        patch_px=patch_px,
    )
    _check_any_size(encoder, name)
    return encoder
