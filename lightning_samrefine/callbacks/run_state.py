"""What a run holds from setup to teardown: SAM, and what is known of the batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_samrefine.adapters.batch_adapter import BatchAdapter, RefineInputs
from lightning_samrefine.adapters.candidates import Roles, after_step
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.layouts.overlapping import repeated
from lightning_samrefine.adapters.nested import describe
from lightning_samrefine.adapters.reading_summary import summarize
from lightning_samrefine.adapters.role_search import MissingTargetError
from lightning_samrefine.adapters.sample_names import names_under
from lightning_samrefine.adapters.scores import BinaryKind
from lightning_samrefine.adapters.target_values import IgnoreIndex, TargetCheck, settle_ignore_index
from lightning_samrefine.callbacks.arguments import SharedArguments, num_classes_of
from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
from lightning_samrefine.callbacks.collective import warn_on_this_process
from lightning_samrefine.callbacks.safe_refiner import SafeRefiner, isolated_rng
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.auto_fusion import AutoFusion, FittedFusion
from lightning_samrefine.fusion_weights import FusionWeights
from lightning_samrefine.models import Promptable, load_sam
from lightning_samrefine.models.base import accepts_masks, drop_derived
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.cache.keys import image_digest
from lightning_samrefine.refine.class_filter import check_classes
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.device import Download
from lightning_samrefine.utils.validation import WrongValuesError

# Of embeddings, for the classes of a batch's images.
_SHARED_GB = 0.5


class RunState:
    """A loaded SAM, the refiner around it, and what a run has learned about its batches.

    A loaded SAM is moved to the device, a named one is loaded there. The global random states stay
    as they were.

    Args:
        owner: What messages begin with.
        counted_in: Where failures are counted, for the warning.
        shared: SAM, thresholds, classes, and how batches are read.
        device: SAM's device during the run.
        cache: Keeps embeddings, None for none.
        ignore_index: Target value that is not counted; unused if no targets are read.
        fitted: Weights that an earlier run fitted, for ``refine="auto"``.
        with_probs: Whether refinements have refined probabilities.

    Attributes:
        refiner: Refines single images, and raises if one fails; `refine` does not.

    Raises:
        ValueError: As `load_sam` and `Refiner` raise it.
        FileNotFoundError: No checkpoint at the path.
    """

    def __init__(
        self,
        owner: str,
        counted_in: str,
        shared: SharedArguments,
        device: torch.device,
        cache: EmbeddingCache | None = None,
        ignore_index: IgnoreIndex = None,
        fitted: FittedFusion | None = None,
        with_probs: bool = False,
    ) -> None:
        self._owner, self._shared, self._fitted = owner, shared, fitted
        if self.is_overlapping and cache is None:
            # The maps of an image's classes follow one another, and share its embedding.
            cache = EmbeddingCache("memory", _SHARED_GB)
        self._with_probs = with_probs
        self._auto_refiner: AutoRefiner | None = None
        self._logged_fusion = ""
        self._warn_once = _WarnOnce(owner, counted_in)
        sam = shared.sam
        # A user's own model, and the device to move it back to.
        self._borrowed = None if isinstance(sam, str) else (sam, sam.device)
        with isolated_rng(device):
            if isinstance(sam, str):
                sam = load_sam(sam, shared.checkpoint, device)
            else:
                sam.module.to(device)
        self.cache = cache
        self.refine_with(sam, shared.refine)
        self._adapter: BatchAdapter | None = None
        # One a loader, for each settles the range of its own images.
        self._adapters: dict[int, BatchAdapter] = {}
        self._ignore_index = ignore_index
        self._check_targets: TargetCheck | None = None
        # Loaders with a batch that was read: what fails there later is not an error of the set-up.
        self._understood: dict[int, Roles | None] = {}
        # Loaders without targets, which are left out.
        self._without_targets: set[int] = set()
        self._announced: set[int] = set()
        self._warned_of_classes: set[str] = set()
        # Loaders that were read to their end once: a wrong value there later ends no run.
        self._passed: set[int] = set()

    @property
    def sam(self) -> Promptable:
        """The loaded SAM."""
        return self.refiner.sam

    @property
    def num_classes(self) -> int:
        """C, known from `bind` on."""
        assert self._adapter is not None, "bind comes first"
        assert self._adapter.num_classes is not None
        return self._adapter.num_classes

    @property
    def is_overlapping(self) -> bool:
        """Whether each class is a binary map of its own."""
        return self._shared.adapter.scores_kind == "multilabel"

    def bind(self, pl_module: LightningModule) -> None:
        """Settle the number of classes, after the module's own setup and before any evaluation.

        Raises:
            MisconfigurationException: Neither the arguments nor the module have the number, or the
                default ignore_index is one of the classes.
        """
        self._announced.clear()
        if self._adapter is not None:
            return
        num_classes = self._shared.num_classes or num_classes_of(pl_module)
        try:
            maps = 2 if self.is_overlapping else num_classes
            self._check_targets = TargetCheck(maps, self._ignore_index)
        except ValueError as error:
            raise MisconfigurationException(f"{self._owner}: {error}") from error
        config = self.refiner.config
        check_classes(config, num_classes, self._shared.class_names)
        self._adapter = replace(
            self._shared.adapter,
            num_classes=num_classes,
            class_names=self._shared.class_names,
            device=self.sam.device,
        )
        if config.weights == "auto":
            names = self._shared.class_names or map(str, range(num_classes))
            auto = AutoFusion(tuple(names), self._fitted, config.classes)
            ignored = settle_ignore_index(self._ignore_index, num_classes)
            self._auto_refiner = AutoRefiner(
                self.refiner, auto, ignored, with_probs=self._with_probs
            )
            self._safe = SafeRefiner(self._auto_refiner, self.sam.device, self._warn_once)
        masks = "" if accepts_masks(self.sam) else ", which takes no mask prompts,"
        rank_zero_info(
            f"{self._owner}: SAM {self.sam.name}{masks} on {self.sam.device} refines "
            f"{num_classes} classes with {config}"
            + ("" if config.weights == "auto" else f", {self.fusion_in_use}")
        )

    def begin(self, pl_module: LightningModule, samples: bool = False) -> None:
        """Begin an evaluation: `bind`, and drop what was computed with other weights of SAM.

        Args:
            pl_module: As for `bind`.
            samples: Whether ``refine="auto"`` is fitted to its images at its end.
        """
        self.bind(pl_module)
        self.refiner.recheck_weights()
        if self._auto_refiner is not None:
            self._auto_refiner.start(samples)
            if self.fusion_in_use != self._logged_fusion:
                self._logged_fusion = self.fusion_in_use
                rank_zero_info(f"{self._owner}: refines {self._logged_fusion}")

    @property
    def fusion_in_use(self) -> str:
        """Whether preset or fitted weights are used, and where these come from, in words."""
        weights = self.refiner.config.weights
        if isinstance(weights, FusionWeights):
            return f"with {weights}"
        if self.auto is None:
            return "without fitted weights"
        if self.auto.fitted is None:
            return "with the weights of preset 'fast', not with fitted ones: there are none yet"
        return f"with {self.auto.fitted.final}"

    def refine_with(self, sam: Promptable, config: RefineConfig) -> None:
        """Refine with a SAM and thresholds or weights, before `bind`."""
        refiner = self.refiner = Refiner(sam, config, self._shared.precision, self.cache)
        with_probs = self._with_probs

        def refine(inputs: RefineInputs) -> list[Refinement]:
            return refiner.refine_batch(inputs.images, inputs.probs, inputs.labels, with_probs)

        self._safe = SafeRefiner(refine, sam.device, self._warn_once)

    def resume(self, fitted: FittedFusion) -> None:
        """Use the weights of a checkpoint, which Lightning loads after ``setup``."""
        self._fitted = fitted
        if self.auto is not None:
            self.auto.resume(fitted)

    @property
    def auto(self) -> AutoFusion | None:
        """The fusion of ``refine="auto"``, known from `bind` on; None for another `refine`."""
        return None if self._auto_refiner is None else self._auto_refiner.auto

    def refine(
        self, inputs: RefineInputs, dataloader_idx: int = 0
    ) -> tuple[list[Refinement | None], float]:
        """Refine a batch; an image that fails is None, see `SafeRefiner`."""
        return self._safe(inputs, dataloader_idx)

    def trust(self, dataloader_idx: int) -> None:
        """Note that an earlier run of the same set-up has refined an image of this loader."""
        self._safe.trust(dataloader_idx)

    @torch.no_grad()
    def read(
        self,
        batch: Any,
        outputs: Any,
        capture: ScoresCapture,
        dataloader_idx: int,
        loaders: int = 1,
        ignore_index: int | None = None,
    ) -> RefineInputs | None:
        """Read a batch; the first batch of an evaluation is also described in the log.

        Impossible values, such as a target outside the classes, raise until the whole loader was
        read once, however late they come: the labels of earlier batches probably mean something
        else, too, and the figures would be wrong. Once a loader was read without an error, such a
        batch is left out in later epochs, counted and warned of, like any other unreadable batch:
        the training run goes on.

        Args:
            batch: As the dataloader yields it; what the step has taken out of it is put back.
            outputs: The return value of the step.
            capture: The scores that left the network.
            dataloader_idx: The loader's number.
            loaders: Number of loaders; if there are several, those without targets are left out.
            ignore_index: For the log.

        Returns:
            None for an unreadable batch of a loader with readable ones, and for a loader that
            `is_left_out`.

        Raises:
            ValueError: The first batch of a loader cannot be read.
            WrongValuesError: As described.
        """
        assert self._adapter is not None  # bind comes before any batch
        assert self._check_targets is not None
        if self.is_left_out(dataloader_idx):
            return None
        changed, batch = batch, capture.whole(batch)
        settled = self._understood.get(dataloader_idx)
        try:
            adapter = self._adapters.setdefault(
                dataloader_idx,
                replace(
                    self._adapter,
                    rgb=self._adapter.rgb.fresh(),
                    binary=BinaryKind(),
                    padding=self._adapter.padding.fresh(),
                ),
            )
            captured, seen = capture.take(outputs)
            reading = adapter.read(
                batch, outputs, captured, seen, settled, capture.calls, capture.rivals
            )
            if reading.has_label_maps:
                self._check_targets.predictions(reading.inputs.labels, dataloader_idx)
            inputs, group_key = reading.inputs, self._shared.group_key
            if inputs.targets is not None:
                self._check_targets(inputs.targets, dataloader_idx)
                target = None if reading.roles is None else reading.roles.target
                if target is not None and reading.slices is None and adapter.target_key is None:
                    self._check_targets.against(target, after_step(target, changed, outputs))
            if group_key is not None:
                count = len(inputs.parts)
                groups = names_under(batch, group_key, len(inputs) // count, "group_key")
                inputs = replace(inputs, groups=repeated(list(map(str, groups)), count))
            elif reading.slices is not None and self.auto is not None:
                inputs = replace(inputs, groups=_volumes(inputs))
        except MissingTargetError:
            if dataloader_idx in self._understood or len(self._without_targets) + 1 >= loaders:
                raise
            self._without_targets.add(dataloader_idx)
            warn_on_this_process(
                f"{self._owner}: dataloader {dataloader_idx} has no target under a usual name or "
                f"target_key and is left out; the batch is {describe(batch)}"
            )
            return None
        except Exception as error:
            wrong = isinstance(error, WrongValuesError) and dataloader_idx not in self._passed
            if wrong or dataloader_idx not in self._understood:
                raise
            reason = f"{type(error).__name__}: {error}"
            self._warn_once("unread batch", f"a batch could not be read and is left out ({reason})")
            return None
        self._understood[dataloader_idx] = None if reading.roles is None else reading.roles.places()
        if dataloader_idx not in self._announced:
            self._announced.add(dataloader_idx)
            which = f"dataloader {dataloader_idx}: " if loaders > 1 else ""
            rank_zero_info(f"{self._owner}: {which}{summarize(reading, ignore_index)}")
        return inputs

    def is_left_out(self, dataloader_idx: int) -> bool:
        """Whether a loader has no targets while others have some."""
        return dataloader_idx in self._without_targets

    def warn_of_classes(self, evaluation: str, message: str) -> None:
        """Warn of an evaluation's first message: the later epochs' are in the history as figures.

        The evaluation is named as in the logs, ``"val"`` or ``"val/fast/dataloader_idx_1"``.
        """
        if evaluation not in self._warned_of_classes:
            self._warned_of_classes.add(evaluation)
            rank_zero_warn(
                f"{self._owner}: {evaluation}: {message}. The history has the former as "
                "miou_gain_same_classes, for later evaluations as well; these do not warn"
            )

    def end_pass(self) -> None:
        """Note that the loaders that batches came from were read to their ends."""
        self._passed.update(self._understood)

    def release(self) -> None:
        """Move a user's own SAM back to its device, and drop what was derived from its weights."""
        if self._borrowed is not None:
            sam, device = self._borrowed
            drop_derived(sam)
            sam.module.to(device)


def _volumes(inputs: RefineInputs) -> list[str]:
    """Return a name for each slice, that of its volume: a hash of the first slice."""
    count = len(inputs.parts)
    first = Download(*inputs.images[::count]).wait()
    return repeated([image_digest(image) for image in first], count)


class _WarnOnce:
    """Warns of the first failure of each kind, on any process.

    A class of its own, so that the refiner does not hold a reference to itself.
    """

    def __init__(self, owner: str, counted_in: str) -> None:
        self._owner, self._counted_in = owner, counted_in
        self._kinds: set[str] = set()

    def __call__(self, kind: str, reason: str) -> None:
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        warn_on_this_process(
            f"{self._owner}: {reason}. Further failures of this kind are counted in "
            f"{self._counted_in} without a warning."
        )
