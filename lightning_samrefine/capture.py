"""Scores of a step that does not return them, caught on their way out of the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_samrefine.adapter import find_scores


class ScoresCapture:
    """Remembers the scores that a LightningModule or one of its children returned in a step.

    Hooks are on the module itself, for steps that call ``self(x)``, and on its children, for
    those that call ``self.model(x)``; what the module itself returned wins. A child that was
    given another's scores (such as an upsampling after a head) replaces them. Scores from several
    calls that do not follow from one another (windows, flips, auxiliary heads) are refused: which
    of them the step means cannot be known.

    Under a strategy that sends the step through ``forward`` the module's hook also fires with
    what the step returns, which holds no scores where this is needed.

    Args:
        module: The LightningModule.
        num_classes: C; scores are float (B, C, H, W), or (B, 1, H, W) where C is 2.
    """

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        self._num_classes = num_classes
        self._armed = False
        self._own: list[Tensor] = []
        self._children: list[Tensor] = []
        self._misfit: Tensor | None = None
        self._handles: list[RemovableHandle] = [module.register_forward_hook(self._on_own)]
        self._handles += [
            child.register_forward_hook(self._on_child) for child in _called_children(module)
        ]

    def arm(self) -> None:
        """Start remembering: a batch begins."""
        self._forget()
        self._armed = True

    def take(self) -> tuple[Tensor | None, str]:
        """Stop remembering.

        Returns:
            The scores of this batch or None, and what was seen, for an error. A 4-D tensor of
            another number of channels counts as scores only where the module itself returned it
            and nothing fitting came by: it deserves an error of its own.
        """
        own, children, misfit = self._own, self._children, self._misfit
        self._armed = False
        self._forget()
        for who, calls in (("forward", own), ("the module's children", children)):
            if len(calls) == 1:
                return calls[0], f"scores from {who}"
            if calls:
                return None, f"scores from {len(calls)} calls of {who}, ambiguous"
        return misfit, "nothing" if misfit is None else "a tensor from forward"

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.take()

    def _forget(self) -> None:
        self._own, self._children, self._misfit = [], [], None

    def _on_own(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._armed:
            return
        scores = self._scores_in(output)
        if scores is not None:
            self._own.append(scores)
        elif isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point():
            self._misfit = output.detach()

    def _on_child(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._armed or (scores := self._scores_in(output)) is None:
            return
        given = {value.data_ptr() for value in inputs if isinstance(value, Tensor)}
        self._children = [one for one in self._children if one.data_ptr() not in given]
        self._children.append(scores)

    def _scores_in(self, output: Any) -> Tensor | None:
        found = find_scores(output, self._num_classes)
        fits = isinstance(found, Tensor) and found.ndim == 4 and found.is_floating_point()
        return found.detach() if fits else None


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        # Containers are indexed, not called.
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(child)
        else:
            yield child
