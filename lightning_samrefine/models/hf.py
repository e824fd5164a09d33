"""Promptable models of Hugging Face transformers: SAM, SAM-HQ, SAM 2, EdgeTAM, SAM 3's tracker.

transformers is the optional extra ``[hf]``, imported when a model is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.fast.point_encoding import exact_coordinates
from lightning_samrefine.models.transforms import PaddedFrame, SquashedFrame, resize_and_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PADDED = ("SamModel", "SamHQModel")
_SQUASHED = ("Sam2Model", "EdgeTamModel", "Sam3TrackerModel")

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CENTERED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_FAMILIES = (
    "SAM (MedSAM and others in its layout too), SAM-HQ, SAM 2 and 2.1, EdgeTAM and SAM 3's tracker"
)


class HfPromptable:
    """A promptable model of transformers as a `Promptable`: frozen and in eval mode.

    transformers' `forward` accepts one mask prompt per image, so every prompt is a separate batch
    item with the image's embedding expanded. Points and boxes are encoded in float32 under any
    autocast.

    Args:
        module: A ``SamModel``, ``SamHQModel``, ``Sam2Model``, ``EdgeTamModel`` or
            ``Sam3TrackerModel``. The buffers ``pixel_mean`` and ``pixel_std`` are added to it.
        name: Short name for logs.
        pixel_mean: Mean of the pixel values in [0, 255] by channel; None for the family's.
        pixel_std: Standard deviation of the pixel values.

    Attributes:
        accepts_masks: True: all of these models take mask prompts.

    Raises:
        TypeError: Another module.
    """

    accepts_masks = True

    def __init__(
        self,
        module: PreTrainedModel,
        name: str,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
    ) -> None:
        self._family = _family(module)
        prompts = module.config.prompt_encoder_config
        self.image_size = int(prompts.image_size)
        self.mask_size = 4 * (self.image_size // int(prompts.patch_size))
        frame = PaddedFrame if self._family in _PADDED else SquashedFrame
        self._frame = frame(self.image_size, self.mask_size)
        mean, std = _CENTERED if self._family == "Sam3TrackerModel" else _IMAGENET
        for key, given, own in (("pixel_mean", pixel_mean, mean), ("pixel_std", pixel_std, std)):
            values = [255 * value for value in own] if given is None else list(given)
            # Buffers, as in segment-anything: they move with the module, and are part of the
            # cache's key.
            tensor = torch.tensor(values, device=module.device).view(-1, 1, 1)
            module.register_buffer(key, tensor, persistent=False)
        self.module = module.eval().requires_grad_(False)
        self.name = name

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.module.device

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_in, w_in), the size to which an image of size (H, W) is resized."""
        return self._frame.input_hw(image_hw)

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_n, w_n), the part of a mask prompt that an image of size (H, W) fills."""
        return self._frame.mask_hw(image_hw)

    def encode_images(self, images: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Encode images, each uint8 (3, H, W) RGB of its own size (step 0).

        Returns:
            A tuple of float32 tensors per image: its (1, D, h_e, w_e) embedding, then further
            inputs of the family's decoder: early features for SAM-HQ, finer ones for SAM 2.
        """
        mean, std = self.module.pixel_mean, self.module.pixel_std
        return [
            tuple(part.float() for part in self._encode(resize_and_pad(i, self._frame, mean, std)))
            for i in images
        ]

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        encoded = self.module.get_image_embeddings(pixel_values)
        if self._family == "SamModel":
            return (encoded,)
        if self._family == "SamHQModel":
            embedding, of_global_blocks = encoded
            return embedding, of_global_blocks[0]
        *finer, embedding = encoded
        return embedding, *finer

    def predict_masks(
        self, embedding: tuple[Tensor, ...], prompts: Prompts, multimask_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks of N ≥ 1 prompts on one image (step 7).

        With one mask per prompt, SAM 2 and models derived from it return the best of their three
        masks if the single one is unstable, depending on their configuration.
        """
        module, count = self.module, len(prompts)
        boxes, points, masks = prompts.boxes, prompts.points, prompts.masks
        # Reduced precision would move points by pixels, see SamPromptable.
        with exact_coordinates(self.device):
            sparse, dense = module.prompt_encoder(
                input_points=None if points is None else points[:, None, None],
                input_labels=None if points is None else points.new_ones(count, 1, 1).long(),
                input_boxes=None if boxes is None else boxes[:, None],
                input_masks=None if masks is None else masks[prompts.mask_index][:, None],
            )
            image_pe = module.get_image_wide_positional_embeddings()
        image, *others = (part.expand(count, *part.shape[1:]) for part in embedding)
        extras: dict[str, Any] = {}
        if self._family == "SamHQModel":
            extras = {"hq_token_only": False, "intermediate_embeddings": others}
        elif self._family in _SQUASHED:
            extras = {"high_resolution_features": others}
        logits, pred_iou, *_ = module.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=image_pe.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            **extras,
        )
        logits, pred_iou = logits[:, 0].float(), pred_iou[:, 0].float()
        return (logits, pred_iou) if multimask_output else (logits[:, 0], pred_iou[:, 0])

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Bring (N, m, m) logits to (N, H, W) float32 (step 9)."""
        return self._frame.postprocess_masks(low_res_logits, image_hw)


def load_hf(model: str | Path, device: str | torch.device = "cpu") -> HfPromptable:
    """Load a promptable model of transformers, from the hub or a local folder.

    Files of the hub are cached in ``HF_HOME``; ``HF_HUB_OFFLINE=1`` disables downloads. Code in a
    repository and pickled code in a weights file are never executed.

    Args:
        model: Hub id, such as ``"facebook/sam2.1-hiera-small"``, or a folder written by
            ``save_pretrained``.
        device: Device of the weights.

    Returns:
        The model, frozen and in eval mode, float32.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: No such folder, or no such model on the hub.
        ValueError: A model of another kind, or incomplete weights.
    """
    try:
        from transformers import AutoModelForMaskGeneration
    except ImportError as error:
        raise ImportError(
            'SAM hf needs transformers: pip install "lightning-samrefine[hf]" '
            f"({type(error).__name__}: {error})"
        ) from error
    source = _source(model)
    try:
        # Weights missing in a checkpoint are initialized randomly before they are reported.
        with torch.random.fork_rng(devices=[]):
            module, report = AutoModelForMaskGeneration.from_pretrained(
                source,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except OSError as error:
        raise FileNotFoundError(
            "checkpoint must be a hub id or a folder with config.json and weights for SAM hf, got "
            f"{str(model)!r}, which transformers cannot find ({_first_line(error)}){_where()}"
        ) from error
    except Exception as error:  # depends on the reader of the file format
        raise ValueError(
            f"checkpoint must be a promptable model of transformers, {_FAMILIES}, got "
            f"{str(model)!r}, which cannot be loaded ({_first_line(error)})"
        ) from error
    _check_complete(report, model)
    mean, std = _normalization(source)
    name = Path(source).name if Path(source).is_dir() else source
    return HfPromptable(module.to(device), name, mean, std)


def _family(module: Any) -> str:
    for cls in type(module).__mro__:
        if cls.__name__ in (*_PADDED, *_SQUASHED):
            return cls.__name__
    raise TypeError(
        f"module must be one of transformers' {', '.join((*_PADDED, *_SQUASHED))}, got "
        f"{type(module).__name__}"
    )


def _source(model: str | Path) -> str:
    """Return a folder's full path, or the id unchanged."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    looks_local = isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~"))
    if looks_local:
        raise FileNotFoundError(
            "checkpoint must be a hub id or a folder with config.json and weights for SAM hf, got "
            f"{str(model)!r}, which is not a folder"
        )
    return str(model)


def _where() -> str:
    from huggingface_hub import constants

    offline = "; HF_HUB_OFFLINE is set, so none are fetched" if constants.HF_HUB_OFFLINE else ""
    return f". Files of the hub are cached in {constants.HF_HUB_CACHE} (HF_HOME){offline}"


def _check_complete(report: dict[str, Any], model: str | Path) -> None:
    """Raise for a checkpoint with missing weights, which transformers only warns of."""
    for what, keys in (
        ("has no", report["missing_keys"]),
        ("has another shape of", report["mismatched_keys"]),
    ):
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            raise ValueError(
                f"checkpoint must be a complete promptable model, got {str(model)!r}, which {what} "
                f"{len(names)} weights ({names[0]}, …)"
            )


def _normalization(source: str) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and standard deviation of pixel values in [0, 255], None if unknown."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"SAM hf: {source} does not specify how images are normalized "
            f"({_first_line(error)}); the values of its family's training are used",
            stacklevel=4,
        )
        return None, None
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
    return [value / scale for value in _triple(mean)], [value / scale for value in _triple(std)]


def _triple(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else (value, value, value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
