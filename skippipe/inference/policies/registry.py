"""The policies by name."""

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from skippipe.errors import InputError
from skippipe.inference.policies.absence import WithoutAbsent
from skippipe.inference.policies.base import Policy, PolicyContext

PACKAGE = "skippipe.inference.policies"


@dataclass(frozen=True)
class PolicyEntry:
    """A kind of policy and where it is built."""

    module: str
    summary: str
    build: str = "build"
    has_argument: bool = False
    decides_keep: bool = False
    """Whether the argument alone says what runs, so that --keep says nothing."""


KINDS = {
    "full": PolicyEntry("full_depth", "every layer"),
    "random": PolicyEntry("random_stages", "random stages, drawn anew for each batch"),
    "stages": PolicyEntry("given_stages", "these stages, in this order: stages:0,2,3", "build_given", True, True),
    "without": PolicyEntry(
        "given_stages", "stages left when nodes are gone: without:NODE,...", "build_without", True, True
    ),
    "best": PolicyEntry("best_stages", "stages that matter most on a calibration text", has_argument=True),
    "unified": PolicyEntry("unified", "layers spread evenly, after a full prompt"),
    "skipdecode": PolicyEntry("skipdecode", "fewer layers for later tokens", has_argument=True),
    "exit": PolicyEntry("early_exit", "the first layers"),
    "ffn-skip": PolicyEntry("ffn_skip", "all attention, feed-forward blocks skipped token by token", has_argument=True),
}


def find_policy(specification: str) -> tuple[PolicyEntry, str]:
    """Return the kind of `NAME` or `NAME:ARGUMENT` and the argument; raise `InputError` for an unknown one."""
    name, colon, argument = specification.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        close = difflib.get_close_matches(name, list(KINDS), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"policy {name!r}: unknown{hint}; there are {', '.join(KINDS)}")
    if colon and not kind.has_argument:
        raise InputError(f"policy {specification!r}: {name} takes nothing after its name")
    if kind.decides_keep and not argument:
        raise InputError(f"policy {name!r}: say what runs: {kind.summary}")
    return kind, argument


def build_policy(specification: str, request: PolicyContext) -> Policy:
    """Return the policy that `NAME` or `NAME:ARGUMENT` names; raise `InputError` where it cannot be had."""
    kind, argument = find_policy(specification)
    build: Callable[[PolicyContext], Policy] = getattr(importlib.import_module(f"{PACKAGE}.{kind.module}"), kind.build)
    policy = build(replace(request, argument=argument))
    decoder = request.decoder
    whole = not decoder.absent_stages and decoder.is_here(decoder.all_layers)
    return policy if whole else WithoutAbsent(policy, decoder)
