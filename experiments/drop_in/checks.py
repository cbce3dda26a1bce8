"""The columns of the table: each a property of a converted model, as a number that must not pass a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.drop_in.subjects import CONVERSION, CUT, PADS, Subject
from liegroup_attn.nn import LieFlow, convert_attention

__all__ = ["BOUNDS", "CHECKS", "Check", "converted", "measure"]

CLOSE = 2e-5  # of outputs of unit size, float32; twice through other kernels


class Check(NamedTuple):
    """A column: ``of(subject)`` gives the number, None where the property does not apply."""

    title: str
    what: str  # in a sentence
    bound: float
    of: Callable[[Subject], float | None]


def converted(subject: Subject, moved: bool = True) -> nn.Module:
    """The model after the conversion; ``moved``: with other times and rates for every head."""
    model = subject.build()
    convert_attention(model, **CONVERSION, **subject.options)
    if moved:
        rng = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for flow in _flows(model):
                flow.time.copy_(0.3 + torch.rand(flow.time.shape, generator=rng))
                flow.rate_weight.copy_(torch.randn(flow.rate_weight.shape, generator=rng))
    return model.eval()


def measure(subject: Subject) -> dict[str, float | None]:
    """Title → number, for every column."""
    return {check.title: check.of(subject) for check in CHECKS}


def _equal(subject: Subject) -> float:
    """Largest difference of outputs at time 0, with and without gradients."""
    model, found = subject.build(), 0.0
    for padded in (False, True) if subject.pads else (False,):
        inputs = subject.inputs(padded=padded)
        with torch.no_grad():
            expected = subject.run(model, inputs)
        changed, defined = converted(subject, moved=False), expected.isfinite()
        expected = expected.masked_fill(~defined, 0)  # torch's kernels give NaN to rows that see no token at all
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out = subject.run(changed, inputs).masked_fill(~defined, 0)
                found = max(found, _gap(subject, out, expected, padded))
        if not defined.any(-1).flatten().float().mean() > 0.4:
            raise AssertionError(f"{subject.name}: most outputs of the model as it was are not finite")
    return found


def _trains(subject: Subject) -> float:
    """How many of the new parameters have no gradient: times at time 0, all of them after."""
    idle = 0
    for moved in (False, True):
        model = converted(subject, moved)
        model.zero_grad()
        out = subject.run(model, subject.inputs())
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
        for flow in _flows(model):
            names = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            idle += len([name for name in names if moved or name == "time"])
    return float(idle)


def _modes(subject: Subject) -> float:
    """Largest difference between train, eval, no_grad and inference mode, where time passes."""
    model, inputs = converted(subject), subject.inputs(padded=subject.pads)
    expected = subject.run(model.train(), inputs).detach()
    found = _gap(subject, subject.run(model.eval(), inputs), expected, subject.pads)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for training in (True, False):
                found = max(found, _gap(subject, subject.run(model.train(training), inputs), expected, subject.pads))
    return found


def _future(subject: Subject) -> float | None:
    """Largest change of earlier outputs when later tokens change."""
    if not subject.causal:
        return None
    model, found = converted(subject), 0.0
    for grad in (False, True):  # some models take other ways
        with torch.set_grad_enabled(grad):
            before, after = (subject.run(model, subject.inputs(changed=c)).detach() for c in ("", "later"))
        if not (before[:, CUT:] - after[:, CUT:]).abs().max() > 1e-3:
            raise AssertionError(f"{subject.name}: the change of later tokens changed nothing at all")
        found = max(found, _largest(before[:, :CUT] - after[:, :CUT]))
    return found


def _padding(subject: Subject) -> float | None:
    """Largest change of other outputs when the padding changes."""
    if not subject.pads:
        return None
    model, found = converted(subject), 0.0
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            before, after = (subject.run(model, subject.inputs(changed=c, padded=True)) for c in ("", "padding"))
            open_ = subject.run(model, subject.inputs(changed="padding"))
        if not _gap(subject, open_, before, True) > 1e-4:
            raise AssertionError(f"{subject.name}: without a mask the padding would not be seen either")
        found = max(found, _gap(subject, after, before, True))
    return found


def _reload(subject: Subject) -> float:
    """Largest difference of outputs after saving, building anew and loading, where time passes."""
    model = converted(subject)
    again = subject.reload(model)
    with torch.no_grad():
        return float((subject.run(model, subject.inputs()) - subject.run(again, subject.inputs())).abs().max())


def _generate(subject: Subject) -> float | None:
    """Largest difference of scores between decoding with a cache and recomputation, where time passes; inf if tokens differ."""
    if subject.generate is None:
        return None
    model = converted(subject)
    with torch.no_grad():
        (cached, scores), (anew, expected) = (subject.generate(model, use) for use in (True, False))
    if not torch.equal(cached, anew):
        return math.inf
    return 0.0 if scores is None or expected is None else _largest(scores - expected)


CHECKS = (
    Check("equal at t = 0", "outputs as before the conversion, with and without padding and gradients", CLOSE, _equal),
    Check("trains", "new parameters without a gradient", 0.0, _trains),
    Check("train = eval = no_grad", "where time passes, without dropout", CLOSE, _modes),
    Check("no future leak", "change of earlier outputs when later tokens change", CLOSE, _future),
    Check("no padding leak", "change of other outputs when padding changes", CLOSE, _padding),
    Check("save, load", "outputs after saving, building anew and loading", CLOSE, _reload),
    Check("cached = recomputed", "scores of generated tokens, which must be the same ones", 1e-4, _generate),
)


BOUNDS = {check.title: check.bound for check in CHECKS}


def _flows(model: nn.Module) -> Iterator[LieFlow]:
    return (m for m in model.modules() if isinstance(m, LieFlow))


def _gap(subject: Subject, found: Tensor, expected: Tensor, padded: bool) -> float:
    """Largest difference, but at padding, whose outputs nobody reads."""
    difference = (found - expected).detach()
    if padded and difference.dim() > 2:
        difference[1, :PADS] = 0
    return _largest(difference)


def _largest(difference: Tensor) -> float:
    """Largest absolute value; inf for NaN, which no bound admits."""
    largest = float(difference.detach().abs().max())
    return math.inf if math.isnan(largest) else largest
