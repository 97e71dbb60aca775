"""What changes from experiment to experiment, in groups: network, training, prediction. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pixnet_sd._arguments import check_fields
from pixnet_sd.errors import PixNetError

Aggregation = Literal["mean", "sum"]
ObjectiveName = Literal["nb_pcc", "mse_pcc"]


class _Params:
    """Check fields when they are set, and read a group from what a verb was given."""

    def __post_init__(self) -> None:
        for name, value in check_fields(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def read(cls, given: Self | Mapping[str, Any] | None) -> Self:
        """Make the group from an instance, a mapping of its fields, or None for the defaults.

        Raises
        ------
        PixNetError
            The mapping has another key than the group's fields.
        """
        if isinstance(given, cls):
            return given
        values = dict(given) if isinstance(given, Mapping) else {}
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
                raise PixNetError(f"{cls.__name__} has no field {name!r}: {hint}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelParams(_Params):
    """What is trained, for `model_params` of :func:`pixnet_sd.tl.fit`.

    Attributes
    ----------
    encoder
        timm model: a ConvNet with maps at strides 4 to 32, or a ViT.
    encoder_weights
        ``"imagenet"``, a path to a safetensors or torch file, or None for random weights.
    freeze_encoder
        Keep encoder weights and batch-norm statistics. Its features are then computed once and kept on disk during
        the run, which makes training on a CPU several times faster.
    decoder
        ``"laterals"``: every level of the pyramid is standardised and projected before it is fed in. ``"paper"``: the
        encoder's own channels are (Eq. 3).
    decoder_width
        Channels of the decoder at the coarsest stride; each finer level has half, down to 32. With
        ``decoder="paper"`` the hidden width of all feed-forwards.
    working_mpp
        Micrometres per pixel at which the network sees a slide; the map's pixels are four times as large.
    aggregation
        ``"mean"`` over a region's pixels, or ``"sum"`` (Eq. 5 to the letter). None: the mean for
        ``objective="mse_pcc"``, whose log-normalised targets do not add up, so that with regions of several sizes only
        the mean puts them on one scale; the sum for counts, which takes nothing else.
    target_sum
        Targets are ``log1p(target_sum * x / sum(x))``, natural logarithm, the sum over all genes of a region.
    """

    encoder: str = field(default="resnet18", metadata={"help": "timm model"})
    encoder_weights: str | Path | None = field(default="imagenet", metadata={"help": "'imagenet', a file, or none"})
    freeze_encoder: bool = field(default=False, metadata={"help": "keep the encoder's weights; much faster on a CPU"})
    decoder: Literal["laterals", "paper"] = field(default="laterals", metadata={"help": "shape of the decoder"})
    decoder_width: int = field(default=512, metadata={"help": "channels of the decoder at the coarsest stride"})
    working_mpp: float = field(default=0.5, metadata={"help": "µm per pixel at which the network sees a slide"})
    aggregation: Aggregation | None = field(default=None, metadata={"help": "of pixels to regions"})
    target_sum: float = field(default=1e4, metadata={"help": "of log-normalised expression"})

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the network of the paper (arXiv 2503.01347): Eq. 3 and Eq. 5 to the letter."""
        return cls(**{"decoder": "paper", "aggregation": "sum", **changes})


@dataclass(frozen=True, kw_only=True)
class TrainParams(_Params):
    """How it is trained, for `train_params` of :func:`pixnet_sd.tl.fit`.

    Attributes
    ----------
    lr, weight_decay
        Of the optimizer.
    optimizer
        ``"adamw"``, or ``"adam"`` (the weight decay as an L2 term).
    anneal
        The rate follows one cycle and falls to zero (True), which suits a run of known length, or is constant (False).
        None: one cycle when nothing is held out.
    pcc_weight
        Weight of the correlation loss, λ of Eq. 6.
    max_steps
        Most steps of the optimizer, each on `batch_size` tiles; None: as many as `max_epochs` takes. On a large slide,
        where a pass over all tiles is long, this bounds the time.
    patience
        Stop after so many epochs without a better held-out PCC; None never stops early.
    keep_best
        End with the weights of the best epoch on held-out regions, instead of the last.
    tile_px
        Side of a training tile in working pixels, a multiple of 32.
    stain_jitter
        Strength of the random change of stain.
    compile
        Run the network through ``torch.compile``.
    allow_any_mpp
        Accept a slide outside 0.1-2 µm per pixel.
    """

    lr: float = field(default=5e-4, metadata={"help": "learning rate"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of the optimizer"})
    optimizer: Literal["adamw", "adam"] = field(default="adamw", metadata={"help": "optimizer"})
    anneal: bool | None = field(default=None, metadata={"help": "one cycle of the learning rate"})
    pcc_weight: float = field(default=2.0, metadata={"help": "λ of Eq. 6"})
    max_steps: int | None = field(default=None, metadata={"help": "most steps of the optimizer"})
    patience: int | None = field(default=30, metadata={"help": "epochs without a better held-out PCC before it stops"})
    keep_best: bool = field(default=True, metadata={"help": "end with the best epoch on held-out regions"})
    tile_px: int = field(default=512, metadata={"help": "side of a tile, working pixels, a multiple of 32"})
    stain_jitter: float = field(default=0.05, metadata={"help": "strength of the random change of stain"})
    compile: bool = field(default=False, metadata={"help": "run the network through torch.compile"})
    allow_any_mpp: bool = field(default=False, metadata={"help": "accept a slide outside 0.1-2 µm per pixel"})

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the schedule of the paper (arXiv 2503.01347): Adam at a constant rate, the last epoch kept."""
        paper = {"optimizer": "adam", "anneal": False, "pcc_weight": 0.5, "keep_best": False, "patience": None}
        return cls(**{**paper, "stain_jitter": 0.0, **changes})


@dataclass(frozen=True, kw_only=True)
class PredictParams(_Params):
    """How it is predicted, for `predict_params` of :func:`pixnet_sd.tl.predict`.

    Attributes
    ----------
    tile_px
        Side of a tile, working pixels; decides about memory, not about the result (for encoders with global
        operations it does, and the training tile size is the default). Default 1024.
    n_symmetries
        Average the prediction over 1, 4 (mirrored) or 8 (mirrored and turned) copies of each tile.
    allow_any_mpp
        Accept a slide outside 0.1-2 µm per pixel.
    allow_poor_model
        Predict with a model whose record says that it is worse than predicting the mean of each gene: its mean squared
        error (``model.record.training["mse"]``) is more than 1.5 times that of the means (``"gene_mean_mse"``) with a
        PCC of at most 0.1, or more than ten times it.
    """

    tile_px: int | None = field(default=None, metadata={"help": "side of a tile, working pixels, a multiple of 32"})
    n_symmetries: Literal[1, 4, 8] = field(default=1, metadata={"help": "average over mirrored and turned copies"})
    allow_any_mpp: bool = field(default=False, metadata={"help": "accept a slide outside 0.1-2 µm per pixel"})
    allow_poor_model: bool = field(default=False, metadata={"help": "predict with a model worse than gene means"})
