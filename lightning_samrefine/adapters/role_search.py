"""Finds image, target and scores in a batch, a step's output and a forward hook.

Order of precedence: the user's keys, the usual names, the network's output (for scores), and last a
single tensor without a usual name. If two tensors are equally likely, there is no guess: the error
lists them and the argument that selects one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import (
    HOOK_KEY,
    IMAGE_NAMES,
    TARGET_NAMES,
    TARGET_NAMES_IN_OUTPUTS,
    Found,
    Roles,
    ambiguous,
    distinct,
    has_pixels,
    is_copy,
    is_image,
    is_target,
    items,
    of,
    same_size,
)
from lightning_samrefine.adapters.layouts.overlapping import is_multi_hot
from lightning_samrefine.adapters.nested import (
    Samples,
    at_key,
    at_position,
    describe,
    leaves,
    named,
)
from lightning_samrefine.adapters.network_view import (
    CROPPED,
    TURNS,
    NetworkCall,
    difference,
    recolors,
    turned_back,
)
from lightning_samrefine.adapters.score_agreement import ScoresAgreement
from lightning_samrefine.adapters.score_search import ScoresSearch
from lightning_samrefine.adapters.scores import ScoresKind
from lightning_samrefine.utils.validation import WrongValuesError

# Maximum share of pixels whose labels a step changes after the network, by a threshold or the like.
_CHANGED_BY_STEP = 0.25
# Positions of a tuple after (image, target) that may hold the target instead.
_LATER = (2, 3, 4)


class MissingTargetError(ValueError):
    """A batch with image and scores, but without a target."""


@dataclass(frozen=True)
class RoleSearch:
    """Finds image, target and scores.

    Args:
        num_classes: C ≥ 2.
        image_key: The user's key of the image, None to search.
        target_key: That of the target.
        scores_key: That of the scores.
        scores_kind: Kind of scores.
        needs_target: Whether to search a target.
        shows: Whether a value has the shape of images.
    """

    num_classes: int
    image_key: str | None = None
    target_key: str | None = None
    scores_key: str | None = None
    scores_kind: ScoresKind = "auto"
    needs_target: bool = True
    shows: Callable[[Samples], bool] = is_image

    def __call__(
        self, batch: Any, outputs: Any, captured: Tensor | None, rivals: Sequence[Found] = ()
    ) -> Roles:
        """Search one batch.

        Args:
            batch: As the dataloader yields it.
            outputs: The step's output.
            captured: Scores captured by a forward hook.
            rivals: What else left the modules and may be the prediction.

        Raises:
            ValueError: Two tensors are equally likely, or the only one cannot be scores.
        """
        image, target = self._image_and_target(batch, outputs)
        search = ScoresSearch(self.num_classes, self.scores_key, self.scores_kind)
        known = target if target is not None and self._fits_target(target.value) else None
        # Unsuitable shapes raise in the conversion.
        shown = image if image is not None and self.shows(image.value) else None
        scores = search(batch, outputs, captured, shown, known, rivals)
        if scores is not None and scores.source == "outputs" and self.scores_key is None:
            self._check_crop(outputs, image, scores)
        return Roles(image, target, scores)

    def again(self, settled: Roles, batch: Any, outputs: Any, captured: Tensor | None) -> Roles:
        """Return the tensors at the places found by a search in an earlier batch."""
        sources = {"batch": batch, "outputs": outputs}

        def at(found: Found | None) -> Found | None:
            if found is None:
                return None
            if found.source == "forward":
                return None if captured is None else Found("forward", (), captured)
            held = of(found.source, leaves(sources[found.source]))
            return next((one for one in held if one.path == found.path), None)

        return Roles(at(settled.image), at(settled.target), at(settled.scores))

    def check_view(self, roles: Roles, calls: Sequence[NetworkCall]) -> None:
        """Raise if the network's input was another view than the batch's image, or its output one.

        A step may have undone the view in the scores that it returns. Of several calls every one
        must be of a flipped or rotated image: crops are windows then, whose scores a step merges.

        Args:
            roles: With image and scores.
            calls: What the network was given and returned.

        Raises:
            WrongValuesError: As described.
        """
        image, scores = roles.image, roles.scores
        if image is None or scores is None or not self.shows(image.value):
            return
        nearest = [one for call in calls for group in call.given[:1] for one in group]
        if scores.source == "forward" and any(recolors(calls[0].scores, one) for one in nearest):
            raise WrongValuesError(
                f"scores must be those of a network, got {scores}, a linear map of the image's "
                "colors, as of a normalization. Return the scores from the step (such as "
                f"{{'logits': logits}}); scores_key={HOOK_KEY!r} takes these"
            )
        views = []
        for call in calls:
            views.append(difference(call.given, image.value))
            if len(calls) > 1 and views[-1] not in TURNS:
                return
        for call, view in zip(calls, views, strict=True):
            hook = Found("forward", (), call.scores)
            if view is None or (
                scores.source != "forward" and not self._has_view(image, scores, hook, view)
            ):
                continue
            raise WrongValuesError(
                f"scores must be of {image}, got {scores} of a network that was given "
                f"{describe(call.given[0][0])}, the image {view}. In the step, turn the scores "
                "back or resize them to the image and return them (such as {'logits': logits}), or "
                "return image, target and scores of one view; "
                f"scores_key={(scores.key or HOOK_KEY)!r} takes them for those of the image"
            )

    def _has_view(self, image: Found, scores: Found, hook: Found, view: str) -> bool:
        """Whether a step's scores have the network's view of the image.

        They have if they agree at least as well with the network's scores as with these turned
        back: a step may have changed them otherwise (a threshold, a smoothing). Labels that are
        the same in both views leave it to the values. What is cropped cannot be turned back: then
        they have if they agree in most pixels.
        """
        share = ScoresAgreement(self.num_classes, self.scores_kind).share_differing
        back = turned_back(items(hook.value)[0], view)
        try:
            differing = share(scores, hook, image)
            if back is not None:
                differing_back = share(scores, replace(hook, value=back), image)
                if differing == differing_back == 0:  # such as one class everywhere
                    return is_copy(scores.value, hook.value) and not is_copy(scores.value, back)
                return differing <= differing_back
        except ValueError:  # of another size than the image: cropped or resized by the step
            return False
        return differing <= _CHANGED_BY_STEP or (view == CROPPED and same_size(scores, hook))

    def _image_and_target(self, batch: Any, outputs: Any) -> tuple[Found | None, Found | None]:
        images = self._candidates(batch, outputs, self.image_key, 0, IMAGE_NAMES, self.shows)
        if not self.needs_target:
            return self._one_image(images), None
        targets = self._candidates(
            batch, outputs, self.target_key, 1, TARGET_NAMES, self._fits_target
        )
        if self.image_key is None and self.target_key is None:
            returned = self._returned_sample(outputs, images)
            if returned is not None:
                return returned
        if not images or not targets:
            return self._one_image(images), self._one_target(targets)
        return self._pair(images, targets)

    def _fits_target(self, value: Samples) -> bool:
        if self.scores_kind == "multilabel":
            return is_multi_hot(value, self.num_classes)
        return is_target(value)

    def _candidates(
        self,
        batch: Any,
        outputs: Any,
        key: str | None,
        position: int,
        names: Sequence[str],
        fits: Callable[[Samples], bool],
    ) -> list[Found]:
        """Return the candidates of the highest precedence: by key, name, or place in the batch.

        Candidates with an unsuitable shape come last: the conversion raises an error about their
        shape, which is more helpful than "not found".
        """
        if key is not None:
            by_key = [*of("batch", [at_key(batch, key)]), *of("outputs", [at_key(outputs, key)])]
            return by_key[:1]
        if position == 0 and isinstance(batch, Tensor):
            return [Found("batch", (), batch)]
        by_name = of("batch", named(batch, names))
        by_position = of("batch", [at_position(batch, position)])
        if position == 1:
            # A valid-pixel or weight map may stand before the target.
            later = [
                leaf for leaf in leaves(batch) if len(leaf.path) == 1 and leaf.path[0] in _LATER
            ]
            by_position += [one for one in of("batch", later) if self._fits_target(one.value)]
        in_outputs = names if position == 0 else TARGET_NAMES_IN_OUTPUTS
        for found in (by_name, by_position, of("outputs", named(outputs, in_outputs))):
            fitting = [one for one in found if fits(one.value)]
            if fitting:
                return distinct(fitting)
        return [one for one in (*by_name, *by_position) if has_pixels(one.value)][:1]

    def _pair(self, images: list[Found], targets: list[Found]) -> tuple[Found, Found | None]:
        """Choose image and target of one sample: neighbors, as shallow as possible, that fit."""
        pairs = [(image, target) for image in images for target in targets]
        if self.target_key is None:
            pairs = [pair for pair in pairs if same_size(*pair)] or pairs
        best = min(_distance(*pair) for pair in pairs)
        pairs = [pair for pair in pairs if _distance(*pair) == best]
        images = distinct(pair[0] for pair in pairs)
        targets = distinct(pair[1] for pair in pairs)
        if len(images) > 1:
            ambiguous("image", images)
        return images[0], self._one_target(targets)

    def _one_image(self, images: list[Found]) -> Found | None:
        shallow = [one for one in images if len(one.path) == min(len(i.path) for i in images)]
        if len(shallow) > 1:
            ambiguous("image", shallow)
        return shallow[0] if shallow else None

    def _one_target(self, targets: list[Found]) -> Found | None:
        if len(targets) > 1:
            targets = [one for one in targets if self._may_be_target(one.value)] or targets
        if len(targets) > 1:
            ambiguous("target", targets)
        return targets[0] if targets else None

    def _may_be_target(self, value: Samples) -> bool:
        """Whether values can be class indices: whole numbers, and bool only for two classes."""
        for item in items(value):
            if item.dtype == torch.bool and self.num_classes > 2:
                return False
            if item.is_floating_point() and not bool((item == item.round()).all()):
                return False
        return True

    def _returned_sample(
        self, outputs: Any, images: list[Found]
    ) -> tuple[Found | None, Found | None] | None:
        """Return a step's output image and target, if their size differs from the batch's.

        Such a step has cropped or resized them, and its scores belong to the returned ones. Fewer
        samples are examples for a picture.
        """
        returned = [o for o in of("outputs", named(outputs, IMAGE_NAMES)) if self.shows(o.value)]
        truths = [
            one
            for one in of("outputs", named(outputs, TARGET_NAMES_IN_OUTPUTS))
            if self._fits_target(one.value)
        ]
        if not returned or not truths or not images or same_size(returned[0], images[0]):
            return None
        if len(returned[0].value) < len(images[0].value):
            return None
        return self._pair(distinct(returned), distinct(truths))

    def _check_crop(self, outputs: Any, image: Found | None, scores: Found) -> None:
        """Raise if the scores belong to another target than the batch's."""
        for truth in of("outputs", named(outputs, TARGET_NAMES_IN_OUTPUTS)):
            if (
                image is not None
                and image.source == "batch"
                and is_target(truth.value)
                and not same_size(truth, image)
                and same_size(truth, scores)
            ):
                raise ValueError(
                    f"image must have the size of the target beside the scores, got {image} and "
                    f"{truth} beside {scores}. Return the image as well if the step crops it; "
                    f"scores_key={scores.key!r} takes the scores for those of the whole image"
                )


def _distance(image: Found, target: Found) -> tuple[bool, int, int]:
    """Rank a pair: neighbors first, then by depth, then by the length of the common path."""
    one, other = image.path[:-1], target.path[:-1]
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    neighbors = image.source == target.source and one == other
    return not neighbors, len(one) + len(other), -shared
