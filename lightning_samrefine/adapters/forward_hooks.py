"""Captures the network's scores with forward hooks, for steps that do not return them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any, TypeAlias
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils.hooks import RemovableHandle

from lightning_samrefine.adapters.candidates import Found, is_target, shares_memory
from lightning_samrefine.adapters.nested import (
    MAX_DEPTH,
    Kept,
    Samples,
    describe,
    leaves,
    restore,
    snapshot,
)
from lightning_samrefine.adapters.network_scores import QUERIES, network_scores, query_masks
from lightning_samrefine.adapters.network_view import CHANNELS, NetworkCall, images_in, recolors

Given: TypeAlias = list[list[Samples]]

# Number of batches of a loader in which the network's inputs are recorded.
_NOTED_BATCHES = 3
# Flips and rotations of an image; more calls are of windows, whose scores would be kept for long.
_MAX_VIEWS = 8
# Names of children whose output is no segmentation, even with the shape of scores.
_OTHER_TASKS = re.compile(r"(^|_)(edge|bound|contour|depth|flow|recon|autoenc|disc|critic|uncert)")


@dataclass(frozen=True)
class _Seen:
    """Scores returned by a module.

    Attributes:
        values: A copy, (B, C, h, w).
        scores: The tensor itself, which the step may change in place; dead once the step drops it.
        given: The images that they were computed from, see `NetworkCall`.
        name: The child that returned them, None for the LightningModule itself.
        is_rival: Whether they may be the prediction, too, where the LightningModule returned
            scores beside the child: those of another network, or made of the module's.
    """

    values: Tensor
    scores: ReferenceType[Tensor]
    given: Given
    name: str | None
    is_rival: bool

    @classmethod
    def of(
        cls, scores: Tensor, given: Given, name: str | None = None, is_rival: bool = False
    ) -> _Seen:
        return cls(scores.detach().clone(), ref(scores), given, name, is_rival)

    @property
    def found(self) -> Found:
        return Found(f"self.{self.name}(…)", (), self.values)

    def rivals(self, own: _Seen) -> bool:
        """Whether a child's scores may be the prediction beside the module's own.

        A critic is given scores, and returns one channel of fewer pixels.
        """
        is_small = self.values.shape[1] == 1 and self.values.numel() < own.values[:, :1].numel()
        pairs = product(*(chain.from_iterable(one.given) for one in (self, own)))
        return self.is_rival and not (is_small and not any(shares_memory(*pair) for pair in pairs))

    def is_among(self, values: Sequence[Any]) -> bool:
        """Whether a module's arguments hold these scores."""
        scores = self.scores()
        return scores is not None and any(
            shares_memory(scores, leaf.value) for value in values for leaf in leaves(value)
        )


class ScoresCapture:
    """Captures the scores that a LightningModule or one of its children returned in a step.

    Hooks are on the module itself, for steps that call ``self(x)``, and on its children, for
    those that call ``self.model(x)``; the module's own output has precedence over those of the
    children that it calls, as has a child's over those of children that it wraps. If the input of a
    child is scores and no target (such as an upsampling after a head), its output replaces them,
    unless it changes their channels or is smaller, as with a critic. Scores from several
    independent calls (windows, flips, auxiliary heads) are
    ambiguous: which of them the step evaluates is unknown. So are those of another network beside
    the module's own (an average of its weights, a teacher; not a critic, nor one named for another
    task, such as ``depth_net``) and label maps that a module returned, if they give other labels.

    A copy is captured: a loss or a metric may change its input in place.

    If a strategy wraps the step in ``forward``, the module's hook also fires with the step's
    output, which is ignored: it is not the network's.

    Losses have no hooks: per-pixel losses have the shape of binary scores. Children that do not
    support hooks, such as scripted ones, are listed if nothing was captured.

    Args:
        module: The LightningModule.
        num_classes: C; scores are float (B, C, H, W), or (B, 1, H, W) if C is 2.

    Attributes:
        calls: After `take`, in the first batches of a loader: the calls that returned scores,
            several if these are ambiguous.
        rivals: After `take`, in the first batches of a loader: what else may be the prediction,
            the scores of other networks and label maps.
    """

    calls: list[NetworkCall]
    rivals: list[Found]
    _batch: dict[Any, Kept] | None
    _channels: Set[int]

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        self._num_classes = num_classes
        self._armed = False
        self._batches: Counter[int] = Counter()
        self._forget()
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before_own),
            module.register_forward_hook(self._on_own, with_kwargs=True),
        ]
        self._without_hooks: list[str] = []
        for name, child in _called_children(module):
            if _is_loss(name, child):
                continue
            try:
                hook = partial(self._on_child, name)
                self._handles.append(child.register_forward_hook(hook, with_kwargs=True))
                self._handles.append(child.register_forward_pre_hook(self._before_child))
            except Exception:  # special kinds of modules may raise anything
                self._without_hooks.append(f"{name!r} ({type(child).__name__})")

    def arm(self, batch: Any = None, dataloader_idx: int = 0) -> None:
        """Start capturing at the start of a batch, whose entries the step may remove or change."""
        self._forget()
        self._batches[dataloader_idx] += 1
        self._notes_inputs = self._batches[dataloader_idx] <= _NOTED_BATCHES
        self._batch = snapshot([batch], MAX_DEPTH + 1)
        if self._notes_inputs:
            found = [leaf.value for leaf in leaves(batch) if isinstance(leaf.value, Tensor)]
            maps = (one for one in found if one.ndim == 4 and not one.is_nested)
            self._channels = CHANNELS | {one.shape[1] for one in maps}
        self._armed = True

    def whole(self, batch: Any) -> Any:
        """Return the batch with the entries that the step has removed or changed since `arm`."""
        return restore([batch], self._batch)[0]

    def take(self, outputs: Any = None) -> tuple[Tensor | None, str]:
        """Stop capturing.

        Args:
            outputs: The step's output.

        Returns:
            The scores of this batch or None, and a description of the captured tensors for an
            error. A 4-D tensor with another number of channels is returned only if it is the
            module's own output and nothing suitable was captured, for an error about its shape.
        """
        steps = [seen for step, seen in self._steps if step is not outputs]
        calls, labels = steps or self._calls, self._labels
        misfit, queries, several = self._misfit, self._queries, self._several
        self._armed, notes_inputs = False, self._notes_inputs
        self._forget()
        own = [seen for seen in calls if seen.name is None]
        others = [seen for seen in calls if seen.name is not None]
        for who, some in (("forward", own), ("the module's children", others)):
            if notes_inputs and len(some) <= _MAX_VIEWS:
                self.calls = [NetworkCall(one.values, one.given) for one in some]
            if len(some) == 1:
                rivals = [one.found for one in others if own and one.rivals(own[0])]
                self.rivals = [*rivals, *labels]
                return some[0].values, f"scores from {who}"
            if some:
                return None, f"scores from {len(some)} calls of {who}, ambiguous"
        if queries:
            return None, QUERIES
        if several:
            listed = " and ".join(several)
            return None, f"{len(several)} likely scores in one output, {listed}, ambiguous"
        if misfit is not None:
            return misfit, "a tensor from forward"
        if self._without_hooks:
            return None, f"nothing; {', '.join(self._without_hooks)} takes no forward hooks"
        return None, "nothing"

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.take()

    def _forget(self) -> None:
        self._steps: list[tuple[Any, _Seen]] = []
        self._calls: list[_Seen] = []
        self._labels: list[Found] = []
        self._before: list[int] = []  # number of calls before each running call of the module
        self._before_children: list[int] = []  # the same of its children
        self._misfit: Tensor | None = None
        self._queries = False
        self._several: list[str] = []
        self._batch = None
        self._channels = CHANNELS
        self._notes_inputs = False
        self._made_from: list[tuple[list[ReferenceType[Tensor]], Given]] = []
        self.calls = []
        self.rivals = []

    def _before_own(self, module: nn.Module, inputs: Any) -> None:
        if not _is_step(inputs):
            self._before.append(len(self._calls))

    def _before_child(self, module: nn.Module, inputs: Any) -> None:
        if self._armed:
            self._before_children.append(len(self._calls))

    def _on_own(
        self, module: nn.Module, inputs: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        is_step = _is_step(inputs)
        start = self._before.pop() if self._before and not is_step else 0
        if not self._armed:
            return
        values = (*inputs, *kwargs.values())
        if not is_step:
            self._note_labels("self(…)", output)
        scores = self._scores_in(output)
        if scores is not None:
            images = images_in(values, self._channels) if self._notes_inputs else []
            seen = _Seen.of(scores, [images] if images else [])
            if is_step:
                self._steps.append((output, seen))
            else:
                before = [one for one in self._calls[:start] if not one.is_among(values)]
                self._calls = [*before, seen]
        elif isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point():
            self._misfit = output.detach().clone()

    def _on_child(
        self, name: str, module: nn.Module, inputs: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if not self._armed:
            return
        start = self._before_children.pop() if self._before_children else len(self._calls)
        values = (*inputs, *kwargs.values())
        images = self._note(values, output) if self._notes_inputs else []
        if not self._before:
            self._note_labels(f"self.{name}(…)", output)
        if (scores := self._scores_in(output)) is None:
            return
        self._calls = self._calls[:start]  # a child that it calls, as a wrapper does
        given = [value for value in values if isinstance(value, Tensor)]
        followed = [one for one in self._calls if _follows(scores, one, given)]
        is_rival = self._notes_inputs and any(one.name is None for one in followed)
        if self._notes_inputs and not any(one.is_among(values) for one in self._calls):
            # Made of the image or of scores; a normalization comes before the module's own call.
            is_late = any(one.name is None for one in self._calls)
            inputs = images_in(values, self._channels | {scores.shape[1]})
            is_rival = any(is_late or not recolors(scores, one) for one in inputs)
            is_rival &= not _OTHER_TASKS.search(name.lower())
        followed = [one for one in followed if one.name is not None]
        self._calls = [one for one in self._calls if not any(one is other for other in followed)]
        # Scores computed from others have the same view.
        images = followed[0].given if followed else images
        self._calls.append(_Seen.of(scores, images, name, is_rival))

    def _note_labels(self, place: str, output: Any) -> None:
        if self._notes_inputs:
            self._labels += [
                Found(place, leaf.path, leaf.value.detach().clone())
                for leaf in leaves(output)
                if isinstance(leaf.value, Tensor)
                and not leaf.value.is_floating_point()
                and is_target(leaf.value)
            ]

    def _note(self, values: Sequence[Any], output: Any) -> Given:
        """Record and return the images that a child's output was computed from, nearest first."""
        given = [leaf.value for value in values for leaf in leaves(value)]
        before: Given = []
        for made, images in self._made_from:
            known = [one for one in (reference() for reference in made) if one is not None]
            if any(shares_memory(one, other) for one in known for other in given):
                before = images
        direct = images_in(values, self._channels)
        images = [direct, *before] if direct else before
        tensors = [leaf.value for leaf in leaves(output) if isinstance(leaf.value, Tensor)]
        self._made_from.append(([ref(one) for one in tensors], images))
        return images

    def _scores_in(self, output: Any) -> Tensor | None:
        found = network_scores(output, self._num_classes)
        if len(found) == 1 and isinstance(found[0].value, Tensor):
            return found[0].value
        self._queries |= bool(query_masks(output, self._num_classes))
        if found:
            self._several = [
                f"output{''.join(f'[{part!r}]' for part in one.path)} {describe(one.value)}"
                for one in found
            ]
        return None


def _called_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        # Containers are indexed, not called.
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{inner}", one) for inner, one in _called_children(child))
        else:
            yield name, child


def _is_loss(name: str, child: nn.Module) -> bool:
    """Whether a child is a loss, by its base class or by the name of itself or its class."""
    called = f"{name} {type(child).__name__}".lower()
    return isinstance(child, _Loss) or "loss" in called or "criterion" in called


def _is_step(inputs: Sequence[Any]) -> bool:
    """Whether it is the step, wrapped in forward: a batch's index is among its inputs."""
    return any(isinstance(value, int) for value in inputs)


def _follows(scores: Tensor, seen: _Seen, given: Sequence[Tensor]) -> bool:
    """Whether a child's output refines earlier scores that are among its inputs.

    A loss has a target among its inputs, and a critic returns one channel of fewer pixels.
    """
    earlier = seen.scores()
    if earlier is None:
        return False
    others = [value for value in given if value.data_ptr() != earlier.data_ptr()]
    return (
        len(others) < len(given)
        and scores.shape[1] == earlier.shape[1]
        and scores.shape[-2] >= earlier.shape[-2]
        and scores.shape[-1] >= earlier.shape[-1]
        and not any(
            value.ndim == 3 or value.shape == earlier.shape or not value.is_floating_point()
            for value in others
        )
    )
