"""The vote on the next epoch, without a network: messages are lost, doubled and late, members die or seem silent."""

import random
import secrets

from hypothesis import given, settings, strategies as st

from skippipe.membership.epoch import Epoch, Member
from skippipe.membership.epoch_vote import EpochVote, Outgoing
from skippipe.membership.messages import Decided, VoteMessage


def member(name: str) -> Member:
    return Member(name=name, host="127.0.0.1", port=1, incarnation=secrets.token_hex(16))


class Network:
    """The votes of all members, and what is under way between them."""

    def __init__(self, size: int):
        self.epoch = Epoch(number=0, members=tuple(member(f"n{index}") for index in range(size)))
        self.names = list(self.epoch.names)
        self.votes = {name: EpochVote(self.epoch, name) for name in self.names}
        self.living = set(self.names)
        self.under_way: list[tuple[str, str, VoteMessage]] = []
        self.decisions = 0

    def send(self, sender: str, outgoing: Outgoing) -> None:
        self.under_way += [(sender, receiver, message) for receiver, message in outgoing]

    def ready(self, *names: str) -> None:
        for name in names:
            self.send(name, self.votes[name].ready({"finished": name}))

    def lose(self, name: str, *, by: str, dead: bool = False) -> None:
        if by in self.living:
            self.send(by, self.votes[by].lost(name, dead=dead))

    def die(self, name: str) -> None:
        self.living.discard(name)

    def deliver(self, index: int, *, keep: bool = False) -> None:
        sender, receiver, message = self.under_way[index] if keep else self.under_way.pop(index)
        if receiver in self.living:
            self.send(receiver, self.votes[receiver].receive(sender, message))

    def deliver_between(self, *names: str, kinds: tuple[type, ...] = (object,)) -> None:
        """Let what is under way between these arrive, of these kinds; the rest stays under way."""
        while found := [
            index
            for index, (sender, receiver, message) in enumerate(self.under_way)
            if {sender, receiver} <= set(names) and isinstance(message, kinds)
        ]:
            self.deliver(found[0])

    def answer(self, name: str) -> None:
        question = self.votes[name].question
        if name in self.living and question is not None:
            self.decisions += 1
            self.send(name, self.votes[name].decide(question, {"by": name, "try": self.decisions}))

    def run(self, turns: int = 60) -> None:
        """Let everything arrive, in order, until nobody has anything to say."""
        for _ in range(turns):
            while self.under_way:
                self.deliver(0)
                for name in self.names:
                    self.answer(name)
            for name in self.living:
                self.answer(name)
                self.send(name, self.votes[name].resend())

    def decided(self) -> dict[str, Epoch | None]:
        return {name: self.votes[name].decided for name in self.names if name in self.living}

    def check(self) -> None:
        held = [epoch for epoch in self.decided().values() if epoch is not None]
        assert all(epoch == held[0] for epoch in held), self.decided()


def everyone_notices(network: Network, *names: str) -> None:
    for name in names:
        network.die(name)
    for name in names:
        for other in network.names:
            if other not in names:
                network.lose(name, by=other, dead=True)


def members_after(network: Network) -> list[str]:
    network.check()
    epochs = list(network.decided().values())
    assert epochs
    assert None not in epochs
    assert epochs[0] is not None
    return list(epochs[0].names)


def test_the_living_agree_and_their_reports_reach_who_decides() -> None:
    network = Network(4)
    network.ready("n0", "n1", "n3")
    everyone_notices(network, "n2")
    while network.under_way:
        network.deliver(0)
    question = network.votes["n0"].question
    assert question is not None
    assert question.reports == {name: {"finished": name} for name in ("n0", "n1", "n3")}
    network.run()
    assert members_after(network) == ["n0", "n1", "n3"]


def test_a_promise_waits_for_the_application() -> None:
    network = Network(3)
    network.ready("n0", "n1")
    network.run(3)
    assert network.votes["n0"].question is None
    assert network.votes["n0"].awaited == ["n2"]
    network.ready("n2")
    network.run()
    assert members_after(network) == ["n0", "n1", "n2"]


def test_one_goes_on_alone_where_all_others_are_dead() -> None:
    network = Network(5)
    network.ready("n4")
    everyone_notices(network, "n0", "n1", "n2", "n3")
    network.run()
    assert members_after(network) == ["n4"]


def test_of_two_islands_the_larger_goes_on() -> None:
    network = Network(7)
    network.ready(*network.names)
    islands = (["n0", "n6"], ["n1", "n2", "n3", "n4", "n5"])
    separate(network, islands)
    assert network.votes["n1"].decided is not None
    assert network.votes["n1"].decided.names == islands[1]
    assert network.votes["n0"].decided is None
    assert "2 of 7 members reach each other (n0, n6)" in str(network.votes["n0"].stuck)


def test_of_two_halves_the_one_with_the_first_member_goes_on() -> None:
    network = Network(4)
    network.ready(*network.names)
    separate(network, (["n0", "n3"], ["n1", "n2"]))
    assert network.votes["n0"].decided is not None
    assert network.votes["n0"].decided.names == ["n0", "n3"]
    assert network.votes["n1"].stuck is not None


def separate(network: Network, islands: tuple[list[str], list[str]]) -> None:
    """Let no message through between two islands, whose members seem silent to each other."""
    for here, there in (islands, islands[::-1]):
        for name in here:
            for other in there:
                network.lose(other, by=name)
    for _ in range(40):
        while network.under_way:
            sender, receiver, _ = network.under_way[0]
            if (sender in islands[0]) == (receiver in islands[0]):
                network.deliver(0)
            else:
                network.under_way.pop(0)
            for name in network.names:
                network.answer(name)
        for name in network.names:
            network.send(name, network.votes[name].resend())


def test_the_dead_and_the_silent_together_stop_a_minority() -> None:
    """n2 may go on with what it and n1 agreed on before n1 died, so n0 does not go on alone."""
    network = Network(3)
    network.die("n1")
    network.ready("n0")
    network.lose("n2", by="n0")
    network.lose("n1", by="n0", dead=True)
    network.run(3)
    assert network.votes["n0"].question is None
    assert network.votes["n0"].stuck is not None


def test_of_two_members_whose_link_is_cut_one_stays_out() -> None:
    network = Network(4)
    network.lose("n3", by="n1")
    network.lose("n1", by="n3")
    network.ready(*network.names)
    network.run()
    assert members_after(network) == ["n0", "n1", "n2"]


def test_a_proposer_that_dies_after_its_proposal_has_its_way_where_it_may_have_been_decided() -> None:
    network = Network(3)
    network.ready(*network.names)
    while network.under_way:
        network.deliver(0)
    network.answer("n0")
    network.deliver(0)  # n1 accepts: with n0 a majority
    everyone_notices(network, "n0")
    network.run()
    assert members_after(network) == ["n0", "n1", "n2"]
    assert network.decisions == 1


def test_the_last_words_of_the_dead_change_nothing_that_the_living_began_later() -> None:
    network = Network(5)
    network.ready(*network.names)
    for name in ("n0", "n1", "n2"):
        for silent in ("n3", "n4"):
            network.lose(silent, by=name)
    network.deliver_between("n0", "n1", "n2")
    network.answer("n0")
    network.deliver_between("n0", "n1", "n2")  # decided; n3 and n4 will hear of it late
    everyone_notices(network, "n0", "n1", "n2")
    network.deliver_between("n3", "n4")
    network.answer("n3")
    network.deliver_between("n0", "n4", kinds=(Decided,))
    assert network.votes["n4"].decided is None
    network.run()
    assert members_after(network) == ["n3", "n4"]


@settings(max_examples=250)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_two_living_members_ever_hold_different_epochs(seed: int) -> None:
    """Messages wait, are lost or doubled; members die, seem silent, learn of deaths or not, in any order."""
    chance = random.Random(seed)
    network = Network(chance.randint(2, 6))
    network.ready(*network.names)
    held: set[tuple[str, str]] = set()
    deaths, silences, holds = (chance.choice(each) for each in ((0, 0.3, 1), (1, 4, 8), (0, 3, 8)))
    kinds = ("deliver", "answer", "drop", "silent", "notice", "resend", "die", "hold", "free")
    for what in chance.choices(
        kinds, (40, 15, 1, silences, 4, 5, deaths, holds, holds / 3), k=chance.choice((60, 150))
    ):
        one, other = chance.choice(network.names), chance.choice(network.names)
        passing = [index for index, way in enumerate(network.under_way) if way[:2] not in held]
        if what == "deliver" and passing:
            network.deliver(chance.choice(passing), keep=chance.random() < 0.05)
        elif what == "answer":
            network.answer(one)
        elif what == "drop" and passing:
            network.under_way.pop(chance.choice(passing))
        elif what == "silent":
            network.lose(other, by=one)
        elif what == "notice":
            for name in sorted(set(network.names) - network.living):
                network.lose(name, by=one, dead=True)
        elif what == "resend" and one in network.living:
            network.send(one, network.votes[one].resend())
        elif what == "die":
            for name in chance.sample(sorted(network.living), chance.randrange(len(network.living))):
                network.die(name)
        elif what == "hold":
            held.add((one, other))
        elif what == "free":
            held.discard(chance.choice(sorted(held) or [("", "")]))
        network.check()
    settle(network)


def settle(network: Network) -> None:
    """Everybody notices who is dead, and nothing is lost any more: all agree, or say why they are stuck."""
    everyone_notices(network, *(name for name in network.names if name not in network.living))
    network.run()
    network.check()
    assert None not in network.decided().values() or any(network.votes[name].stuck for name in network.living)
