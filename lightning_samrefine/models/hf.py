"""Promptable models of Hugging Face transformers: SAM, SAM-HQ, SAM 2, EdgeTAM, SAM 3's tracker.

transformers itself is imported when a model is loaded: it is the optional extra ``[hf]``.
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

    transformers' own `forward` takes one mask prompt an image, so every prompt here is a batch
    item of its own with the image's embedding expanded. Points and boxes are encoded in float32
    under any autocast.

    Args:
        module: A ``SamModel``, ``SamHQModel``, ``Sam2Model``, ``EdgeTamModel`` or
            ``Sam3TrackerModel``. It gets the buffers ``pixel_mean`` and ``pixel_std``.
        name: Short name for logs.
        pixel_mean: Mean of the pixel values in [0, 255] by channel; the family's own if None.
        pixel_std: Their deviation.

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
            # Buffers, as segment-anything has them: they move with the module, and an embedding
            # cache sees that they differ.
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
            A tuple of float32 tensors an image: its (1, D, h_e, w_e) embedding, then further
            inputs of the family's decoder: early features of SAM-HQ, finer ones of SAM 2.
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

        With one mask a prompt, SAM 2 and its kin return the best of their three masks if the single
        one is unstable, by their configuration.

        Returns:
            Low-resolution logits (N, m, m) float32 and predicted IoU (N,) float32; with
            ``multimask_output`` (N, 3, m, m) and (N, 3).
        """
        module, count = self.module, len(prompts)
        boxes, points, masks = prompts.boxes, prompts.points, prompts.masks
        # A reduced type would move points by pixels, see SamPromptable.
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

    Files of the hub are kept in ``HF_HOME``; with ``HF_HUB_OFFLINE=1`` none are fetched.
    Code in a repository and pickled code in a weights file are never executed.

    Args:
        model: Hub id, such as ``"facebook/sam2.1-hiera-small"``, or a folder that
            ``save_pretrained`` wrote.
        device: Where the weights go.

    Returns:
        The model, frozen and in eval mode, float32.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: No such folder, or nothing at the hub under that name.
        ValueError: A model of another kind, or weights that are not complete.
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
        # Weights that a checkpoint lacks are drawn before they are found to be missing.
        with torch.random.fork_rng(devices=[]):
            module, report = AutoModelForMaskGeneration.from_pretrained(
                source,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except OSError as error:
        raise FileNotFoundError(
            f"checkpoint: got {str(model)!r}, from which transformers loads nothing "
            f"({_first_line(error)}); accepted for SAM hf is a hub id or a folder that holds "
            f"config.json and weights{_where()}"
        ) from error
    except Exception as error:  # transformers raises what each file format's reader raises
        raise ValueError(
            f"checkpoint: got {str(model)!r}, which transformers cannot load as a promptable model "
            f"({_first_line(error)}); accepted are {_FAMILIES}"
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
        f"module: got {type(module).__name__}, accepted are transformers' "
        f"{', '.join((*_PADDED, *_SQUASHED))}"
    )


def _source(model: str | Path) -> str:
    """Return a folder's full path, or the id as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    looks_local = isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~"))
    if looks_local:
        raise FileNotFoundError(
            f"checkpoint: got {str(model)!r}, where there is no folder; accepted for SAM hf is a "
            "hub id or a folder that holds config.json and weights"
        )
    return str(model)


def _where() -> str:
    from huggingface_hub import constants

    offline = "; HF_HUB_OFFLINE is set, so none are fetched" if constants.HF_HUB_OFFLINE else ""
    return f". Files of the hub are kept in {constants.HF_HUB_CACHE} (HF_HOME){offline}"


def _check_complete(report: dict[str, Any], model: str | Path) -> None:
    """Refuse a checkpoint that leaves weights random, which transformers only warns of."""
    for what, keys in (
        ("has no", report["missing_keys"]),
        ("has another shape of", report["mismatched_keys"]),
    ):
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            raise ValueError(
                f"checkpoint: got {str(model)!r}, which {what} {len(names)} weights "
                f"({names[0]}, …); accepted is a complete promptable model"
            )


def _normalization(source: str) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and deviation of pixel values in [0, 255], None without such a file."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"SAM hf: {source} says nothing of how images are normalized "
            f"({_first_line(error)}); the values that its family was trained with are used",
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
