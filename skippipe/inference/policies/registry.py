"""The policies by name: SkipPipe's own, those that a program registers, and those of installed packages.

The table loads nothing that a policy needs, so that help texts can show it at once. An installed package offers a
policy as an entry point of the group `skippipe.policies`, whose name is the policy's and whose object is a
`PolicyEntry`.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from skippipe.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from skippipe.inference.policies.base import Policy, PolicyContext

logger = logging.getLogger(__name__)

GROUP = "skippipe.policies"
"""The group of entry points."""

PolicyBuilder = Callable[["PolicyContext"], "Policy"]


@dataclass(frozen=True)
class PolicyEntry:
    """A policy as `--policy` knows it.

    Raises:
        InputError: The name has other characters, or `decides_keep` has no example of an argument beside it.

    Examples:
        >>> first = PolicyEntry("first", "the first layer", lambda context: FixedLayers((0,)))
        >>> first.usage
        'first'
        >>> PolicyEntry("only", "one layer", "own.policies:build_only", argument="3", decides_keep=True).usage
        'only:3'
    """

    name: str
    """Letters, digits, dots, dashes and underscores."""
    summary: str
    """What runs, in a few words."""
    build: PolicyBuilder | str
    """Returns the policy; or where that function is, `module:function`, to be imported when it is needed."""
    argument: str = ""
    """An example of what may follow the name and a colon; empty where nothing may."""
    decides_keep: bool = False
    """Whether the argument alone says what runs: then it has to be given, and --keep says nothing."""
    decided_by: tuple[str, ...] = ()
    """Options that together say how much runs, where all of them are in the argument: then --keep says nothing."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(
                f"policy {self.name!r}: a name is made of letters, digits, dots, dashes and underscores; a colon "
                "begins the argument"
            )
        if self.decides_keep and not self.argument:
            raise InputError(f"policy {self.name!r}: decides_keep needs an example of the argument that decides")

    @property
    def usage(self) -> str:
        """How it is written: the name, with an argument where that has to be there."""
        return f"{self.name}:{self.argument}" if self.decides_keep else self.name

    def decides(self, argument: str) -> bool:
        """Return whether the policy says with this argument how much runs, whatever --keep is."""
        given = {option.partition("=")[0] for option in argument.split(",")}
        return self.decides_keep or bool(self.decided_by and given.issuperset(self.decided_by))

    def builder(self) -> PolicyBuilder:
        """Return the function that builds the policy."""
        if not isinstance(self.build, str):
            return self.build
        function: PolicyBuilder = EntryPoint(self.name, self.build, GROUP).load()
        return function


_PACKAGE = "skippipe.inference.policies"
OWN = (
    PolicyEntry("full", "every layer", f"{_PACKAGE}.full_depth:build"),
    PolicyEntry("random", "random stages, drawn anew for each batch", f"{_PACKAGE}.random_stages:build"),
    PolicyEntry(
        "stages",
        "these stages, in this order",
        f"{_PACKAGE}.given_stages:build_given",
        argument="0,2,3",
        decides_keep=True,
    ),
    PolicyEntry(
        "without",
        "stages left when nodes are gone",
        f"{_PACKAGE}.given_stages:build_without",
        argument="NODE,...",
        decides_keep=True,
    ),
    PolicyEntry(
        "best",
        "layers that matter most together on a calibration text",
        f"{_PACKAGE}.best.best_choice:build",
        argument="halves",
    ),
    PolicyEntry(
        "file",
        "the layers of a choice that evaluate --save-choice wrote",
        f"{_PACKAGE}.given_choice:build",
        argument="CHOICE",
        decides_keep=True,
    ),
    PolicyEntry("unified", "layers spread evenly, after a full prompt", f"{_PACKAGE}.unified:build"),
    PolicyEntry(
        "skipdecode",
        "fewer layers for later tokens",
        f"{_PACKAGE}.skipdecode:build",
        argument="warm_up=2",
        decided_by=("min", "max"),
    ),
    PolicyEntry("exit", "the first layers", f"{_PACKAGE}.early_exit:build"),
    PolicyEntry(
        "ffn-skip",
        "all attention, feed-forward blocks skipped token by token",
        f"{_PACKAGE}.ffn_skip:build",
        argument="warm_up=16",
        decided_by=("threshold",),
    ),
)
"""SkipPipe's own policies, in the order in which help texts list them."""

_registered = {entry.name: entry for entry in OWN}


def register_policy(entry: PolicyEntry) -> PolicyEntry:
    """Make a policy known by its name in this process.

    Args:
        entry: The policy. Registering the same one again changes nothing.

    Returns:
        The entry.

    Raises:
        InputError: Another policy has this name.

    Examples:
        >>> def build(context):
        ...     return FixedLayers(context.decoder.all_layers[-2:])
        >>> entry = register_policy(PolicyEntry("last-two", "the last two layers", build))
        >>> build_policy("last-two", PolicyContext(model.decoder, keep=1.0)).layers_at(0, 1)
        (4, 5)
    """
    if _registered.get(entry.name, entry) != entry:
        raise InputError(f"policy {entry.name!r}: there is another of this name; choose a name of its own")
    _registered[entry.name] = entry
    return entry


def describe_policies() -> dict[str, str]:
    """Return what runs under each policy, by how it is written; packages are named, not loaded."""
    described = {entry.usage: entry.summary for entry in _registered.values()}
    for offer in entry_points(group=GROUP):
        if offer.name not in _registered:
            described[offer.name] = f"of {_origin(offer)}"
    return described


def check_keep(policy: str, keep: float) -> None:
    """Raise `InputError` for another share than 1 where the policy does not choose by a share."""
    if keep == 1:
        return
    entry, argument = find_policy(policy)
    if entry.decides(argument) or policy == "full":
        raise InputError(
            f"--keep {keep:g}: --policy {policy} runs {entry.summary}, whatever the share; leave --keep out, or choose "
            "another policy, such as --policy unified"
        )


def find_policy(specification: str) -> tuple[PolicyEntry, str]:
    """Return the entry of `NAME` or `NAME:ARGUMENT`, and the argument.

    Raises `InputError` for a name that nobody has or two packages offer, for an argument that is missing or too many,
    and where a package's entry cannot be loaded.
    """
    name, colon, argument = specification.partition(":")
    entry = _find_entry(name)
    if colon and not entry.argument:
        raise InputError(f"policy {specification!r}: {name} takes nothing after its name")
    if entry.decides_keep and not argument:
        raise InputError(f"policy {name!r}: say what runs: {entry.summary}: {entry.usage}")
    return entry, argument


def _find_entry(name: str) -> PolicyEntry:
    offers = sorted(entry_points(group=GROUP, name=name), key=_origin)
    if name in _registered:
        for offer in offers:
            if _registered[name] in OWN:
                logger.warning("policy %r: SkipPipe's own; that of %s is left aside", name, _origin(offer))
        return _registered[name]
    if not offers:
        known = [*_registered, *dict.fromkeys(offer.name for offer in entry_points(group=GROUP))]
        raise InputError(f"policy {name!r}: unknown{did_you_mean(name, known)}; there are {', '.join(known)}")
    if len(offers) > 1:
        raise InputError(f"policy {name!r}: offered by {' and by '.join(map(_origin, offers))}; uninstall one of them")
    return _loaded(offers[0])


def _loaded(offer: EntryPoint) -> PolicyEntry:
    place = f"policy {offer.name!r} of {_origin(offer)}"
    try:
        entry = offer.load()
    except Exception as reason:  # a package's modules may raise anything when they are imported
        raise InputError(f"{place}: {offer.value} cannot be loaded ({type(reason).__name__}: {reason})") from None
    if not isinstance(entry, PolicyEntry):
        raise InputError(f"{place}: {offer.value} is a {type(entry).__name__}; it has to be a PolicyEntry")
    if entry.name != offer.name:
        raise InputError(f"{place}: {offer.value} calls itself {entry.name!r}; the entry point has to have its name")
    return register_policy(entry)


def _origin(offer: EntryPoint) -> str:
    return f"the package {offer.dist.name}" if offer.dist is not None else offer.value
