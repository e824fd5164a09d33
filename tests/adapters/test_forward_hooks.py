"""Which scores count as a step's, and which are ambiguous."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_samrefine.adapters.forward_hooks import ScoresCapture

C = 3
X = torch.rand(2, 3, 6, 8)


class Network(nn.Module):
    """A body and two heads; only the heads return C channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 1)
        self.head = nn.Conv2d(5, C, 1)
        self.aux_head = nn.Conv2d(5, C, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.parts = nn.ModuleList([nn.Conv2d(3, C, 1)])

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def capture(network) -> ScoresCapture:
    capture = ScoresCapture(network, C)
    capture.arm()
    return capture


def test_the_modules_own_scores_win(network, capture):
    expected = network(X)
    network.aux_head(network.body(X))
    found, seen = capture.take()
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert seen == "scores from forward"


def test_a_childs_scores_are_found(network, capture):
    expected = network.head(network.body(X))
    assert torch.equal(capture.take()[0], expected)


def test_a_child_in_a_list_is_found(network, capture):
    expected = network.parts[0](X)
    assert torch.equal(capture.take()[0], expected)


def test_scores_that_follow_from_others_replace_them(network, capture):
    expected = network.up(network.head(network.body(X)))
    assert torch.equal(capture.take()[0], expected)


@pytest.mark.parametrize("wrap", [dict, lambda out: (torch.tensor(1.0), out["out"])])
def test_scores_inside_containers_are_found(wrap):
    class Wrapped(nn.Module):
        def forward(self, x):
            return wrap({"out": x * 2})

    module = Wrapped()
    capture = ScoresCapture(module, C)
    capture.arm()
    module(X)
    assert torch.equal(capture.take()[0], X * 2)


def test_several_calls_of_the_module_are_ambiguous(network, capture):
    network(X)
    network(X.flip(-1))
    found, seen = capture.take()
    assert found is None
    assert "2 calls of forward, ambiguous" in seen


def test_several_heads_are_ambiguous(network, capture):
    features = network.body(X)
    network.head(features)
    network.aux_head(features)
    assert capture.take() == (None, "scores from 2 calls of the module's children, ambiguous")


def test_what_a_step_returned_through_forward_is_no_score(network, capture):
    # As DistributedDataParallel does, which sends the step itself through the module's forward.
    expected = network(X)
    network.register_forward_hook(lambda *_: {"loss": torch.tensor(1.0)})
    for output in (None, torch.tensor(1.0), {"loss": torch.tensor(1.0)}):
        capture._on_own(network, (), {}, output)
    assert torch.equal(capture.take()[0], expected)


def test_a_misfit_of_the_module_itself_is_kept_for_its_error():
    module = nn.Sequential(nn.Conv2d(3, 7, 1))
    capture = ScoresCapture(module, C)
    capture.arm()
    expected = module(X)
    assert torch.equal(capture.take()[0], expected)


def test_nothing_is_remembered_unless_armed_and_nothing_after_taking(network, capture):
    capture.take()
    network(X)
    assert capture.take() == (None, "nothing")
    capture.arm()
    network(X)
    capture.arm()
    assert capture.take() == (None, "nothing")


def test_hooks_go_away(network, capture):
    assert all(m._forward_hooks for m in (network, network.body, network.parts[0]))
    capture.remove()
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("index", [0, 3])
def test_what_a_step_sent_through_forward_returned_is_no_score(network, capture, index):
    expected = network(X)
    returned = {"loss": torch.tensor(1.0), "anything": torch.rand(2, C, 6, 8)}
    capture._on_own(network, ({"image": X}, index), {}, returned)
    assert torch.equal(capture.take(returned)[0], expected)


def test_children_that_take_no_hooks_are_named():
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.jit.script(nn.Conv2d(3, C, 1))

    capture = ScoresCapture(Scripted(), C)
    capture.arm()
    assert capture.take() == (
        None,
        "nothing; 'net' (RecursiveScriptModule) takes no forward hooks",
    )
    capture.remove()


@pytest.mark.parametrize("inside", [False, True])
def test_several_outputs_of_one_network_are_named(inside):
    class Heads(nn.Module):
        def forward(self, x):
            return [x, {"aux_1": x * 2, "seg_1": x * 3}]

    module = nn.Sequential(Heads()) if inside else Heads()
    capture = ScoresCapture(module, C)
    capture.arm()
    module(X)
    assert capture.take() == (
        None,
        "2 likely scores in one output, output[0] float32 (2, 3, 6, 8) and output[1]['seg_1'] "
        "float32 (2, 3, 6, 8), ambiguous",
    )


class Focal(nn.Module):
    """A loss map under a name that does not tell."""

    def forward(self, scores, target):
        map_ = nn.functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
        return map_.reshape(scores.shape)


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 1, 1)
        self.focal = Focal()
        self.critic = nn.Conv2d(1, 1, 2, 2)
        self.smooth = nn.AvgPool2d(3, 1, 1)


@pytest.fixture
def binary() -> Binary:
    torch.manual_seed(0)
    return Binary()


@pytest.mark.parametrize(
    "use",
    [
        lambda module, scores: module.focal(scores, torch.ones(2, 1, 6, 8)),
        lambda module, scores: module.focal(scores, target=torch.ones(2, 1, 6, 8)),
        lambda module, scores: module.critic(scores),
    ],
    ids=["loss", "loss by keyword", "critic"],
)
def test_what_is_made_of_scores_need_not_be_scores(binary, use):
    capture = ScoresCapture(binary, 2)
    capture.arm()
    use(binary, binary.body(X))
    assert capture.take() == (None, "scores from 2 calls of the module's children, ambiguous")


def test_a_child_that_works_on_scores_alone_replaces_them(binary):
    capture = ScoresCapture(binary, 2)
    capture.arm()
    expected = binary.smooth(binary.body(X))
    assert torch.equal(capture.take()[0], expected)


def test_a_batch_may_hold_nested_tensors(network, capture):
    nested = torch.nested.nested_tensor([torch.rand(3, 4, 5), torch.rand(3, 6, 5)])
    capture.arm({"image": X, "nested": nested})
    expected = network(X)
    assert torch.equal(capture.take()[0], expected)


class Teacher(nn.Module):
    """A network, an average of its weights and modules around them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.ema = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(3, C, 3, padding=1)
        self.normalize = nn.BatchNorm2d(3).eval()
        self.smooth = nn.AvgPool2d(3, 1, 1)
        self.calibrate = nn.Conv2d(C, C, 1)
        self.classes = Classes()

    def forward(self, x, labels: bool = False):
        logits = self.body(x)
        return self.classes(logits) if labels else logits


class Classes(nn.Module):
    def forward(self, logits):
        return logits.argmax(dim=1)


class Wrapped(nn.Module):
    """A network, and a child that calls it for several views."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, C, 1)
        self.views = Views(self.body)


class Views(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return (self.inner(x) + self.inner(x.flip(-1)).flip(-1)) / 2


def test_a_child_precedes_the_children_that_it_calls():
    module = Wrapped()
    capture = ScoresCapture(module, C)
    for _ in range(2):
        capture.arm()
        expected = module.views(X)
        assert torch.equal(capture.take()[0], expected)
    capture.arm()
    module.body(X)
    module.views(X)
    assert capture.take() == (None, "scores from 2 calls of the module's children, ambiguous")


class Adversarial(nn.Module):
    """A network of one channel beside others that predict no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.ema = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)
        self.small = nn.Conv2d(3, 1, 2, 2)
        self.depth_net, self.critics = nn.Conv2d(3, 1, 1), nn.Conv2d(4, 1, 2, 2)
        self.patches = nn.Conv2d(1, 1, 2, 2)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("step", "places"),
    [
        (lambda m: m.patches(m(X).sigmoid()), []),
        (lambda m: m.critics(torch.cat([X, m(X).sigmoid()], dim=1)), []),
        (lambda m: (m(X), m.depth_net(X)), []),
        (lambda m: (m(X), m.ema(X)), ["self.ema(…)"]),
        (lambda m: (m(X), m.small(X)), ["self.small(…)"]),
    ],
)
def test_critics_and_networks_of_other_tasks_are_not_listed(step, places):
    module = Adversarial()
    capture = ScoresCapture(module, 2)
    capture.arm()
    step(module)
    assert capture.take()[0].shape[-2:] == X.shape[-2:]
    assert [one.place for one in capture.rivals] == places


@pytest.mark.parametrize(
    ("step", "places"),
    [
        (lambda module: (module.ema(X), module(X)), ["self.ema(…)"]),
        (lambda module: (module(X), module.ema(X)), ["self.ema(…)"]),
        (lambda module: (module(X), module.body(X.flip(-1))), ["self.body(…)"]),
        (lambda module: module.smooth(module(X)), ["self.smooth(…)"]),
        (lambda module: module.smooth(module(X).softmax(dim=1)), ["self.smooth(…)"]),
        (lambda module: module.calibrate(module(X) / 2), ["self.calibrate(…)"]),
        (lambda module: module.classes(module(X)), ["self.classes(…)"]),
        (lambda module: module(X), []),
        (lambda module: module(module.normalize(X)), []),
        (lambda module: module(2 * module.normalize(X)), []),
        (lambda module: module(X, labels=True), ["self(…)"]),
    ],
)
def test_what_else_may_be_the_prediction_is_listed(step, places):
    torch.manual_seed(0)
    module = Teacher()
    capture = ScoresCapture(module, C)
    for batch in range(4):
        capture.arm()
        step(module)
        assert capture.take()[0] is not None
        assert [one.place for one in capture.rivals] == (places if batch < 3 else [])
