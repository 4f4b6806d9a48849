"""Real processes over loopback: who dies, falls silent, comes back, leaves."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq
from member_processes import SECRET, SILENCE_S, MemberProcesses, member_processes

from skippipe.errors import CommunicationError, ConfigError
from skippipe.membership.epoch import Member
from skippipe.membership.keys import run_keys
from skippipe.membership.links import Links
from skippipe.membership.member_link import address_of
from skippipe.membership.membership import Membership
from skippipe.membership.messages import Application, Envelope, Hello

BUSY_S = 2.0
"""What a busy machine may add to any time here."""


def kill(members: MemberProcesses, *names: str) -> float:
    return min([members.signal(name, signal.SIGKILL) for name in names])


def check_epoch(members: MemberProcesses, names: list[str], number: int) -> float:
    """Check that these are in the next epoch, and agree on it; return when the last of them was."""
    epochs = members.wait("epoch", names)
    first, _ = epochs[names[0]]
    assert first.number == number
    assert first.names == names
    assert all(epoch == first for epoch, _ in epochs.values())
    assert first.decision["reports"] == {name: {"finished": name} for name in names}
    return max(at_s for _, at_s in epochs.values())


def test_deaths_are_noticed_at_once_and_the_rest_goes_on_whoever_died() -> None:
    with member_processes(5) as members:
        for number, lost in enumerate([["n2"], ["n0"], ["n1", "n3"]], start=1):
            killed_s = kill(members, *lost)
            members.names = [name for name in members.names if name not in lost]
            assert check_epoch(members, members.names, number) - killed_s < 0.5 + BUSY_S
            ends = members.wait("ended", members.names)
            assert {words for words, _ in ends.values()} <= {f"{name} lost (connection closed)" for name in lost}


def test_the_proposer_and_another_may_die_while_the_vote_lasts() -> None:
    with member_processes(5, slow_decision_s=0.3) as members:
        kill(members, "n4")
        members.wait("proposing", ["n0"])
        killed_s = kill(members, "n0", "n3")
        members.wait("proposing", ["n1"])
        assert check_epoch(members, ["n1", "n2"], 1) - killed_s < 1.0 + BUSY_S


def test_silence_below_the_limit_and_a_long_call_are_no_loss() -> None:
    with member_processes(4) as members:
        members.command("n2", f"hold {3 * SILENCE_S}")
        members.command("n0", "suspect n2")
        members.signal("n1", signal.SIGSTOP)
        members.listen(0.7 * SILENCE_S)
        members.signal("n1", signal.SIGCONT)
        members.listen(2.5 * SILENCE_S)
        assert [told[:2] for told in members.told] == [("n2", "went on")]


def test_silence_beyond_the_limit_is_a_loss_and_who_was_silent_learns_it() -> None:
    with member_processes(4) as members:
        stopped_s = members.signal("n0", signal.SIGSTOP)
        noticed_s = check_epoch(members, ["n1", "n2", "n3"], 1) - stopped_s
        assert SILENCE_S <= noticed_s < SILENCE_S + 1.0 + BUSY_S
        members.signal("n0", signal.SIGCONT)
        kind, words = members.wait("error", ["n0"])["n0"][0]
        assert kind == "LeftOutError"
        assert words.startswith("the run has gone on without n0, which the others did not reach; in it are n1, n2, n3")
        members.wait("ended", members.names)
        members.wait("may not write", ["n0"])
        assert [what for _, what, *_ in members.told] == ["proposing"]


def test_a_minority_ends() -> None:
    with member_processes(4) as members:
        for name in ("n0", "n2", "n3"):
            members.signal(name, signal.SIGSTOP)
        kind, words = members.wait("error", ["n1"])["n1"][0]
        assert kind == "MinorityError"
        assert "1 of 4 members reach each other (n1); n0, n2, n3 may live on without them" in words


def test_an_epoch_ends_without_a_loss_where_a_member_asks_or_leaves() -> None:
    with member_processes(3) as members:
        members.command("n1", "end")
        check_epoch(members, ["n0", "n1", "n2"], 1)
        assert {words for words, _ in members.wait("ended", members.names).values()} == {"transfers failed"}
        members.command("n0", "leave")
        check_epoch(members, ["n1", "n2"], 2)
        assert {words for words, _ in members.wait("ended", ["n1", "n2"]).values()} == {"n0 lost (left)"}


def test_who_leaves_has_seen_that_all_know_the_last_epoch() -> None:
    """The words that tell it to n2 are lost three times; were the others gone by then, it would decide alone."""
    with member_processes(3) as members:
        members.command("n2", "lose 3")
        members.command("n1", "end")
        members.wait("ended", ["n0", "n1", "n2"])
        told = members.wait("epoch", ["n0", "n1"])
        members.command("n0", "leave")
        members.command("n1", "leave")
        last = members.wait("epoch", ["n2"])["n2"][0]
        assert last == told["n0"][0] == told["n1"][0]
        assert last.decision["by"] == "n0"


def test_one_that_was_killed_comes_back_and_another_is_new() -> None:
    with member_processes(3) as members:
        kill(members, "n0")
        check_epoch(members, ["n1", "n2"], 1)
        living = ["n1", "n2"]
        for number, name, contact in ((2, "n0", "n2"), (3, "n9", "n0")):
            asked_s = members.join(name, contact)
            living.append(name)
            epochs = members.wait("epoch", living)
            epoch, at_s = epochs[name]
            assert [other for other, _ in epochs.values()] == [epoch] * len(living)
            assert epoch.number == number
            assert [member.model_dump() for member in epoch.members] == [members.own[name] for name in living]
            assert list(epoch.decision["reports"]) == living[:-1]
            assert at_s - asked_s < 1.0 + BUSY_S
        kill(members, "n1")
        check_epoch(members, ["n2", "n0", "n9"], 4)


def test_strangers_do_not_get_in() -> None:
    """One with another secret, one without any who says that it is n1, and one that does not know the protocol."""
    stranger = Membership.open("n1", "127.0.0.1", "another secret of 16", SILENCE_S)
    member = Membership.open("n0", "127.0.0.1", SECRET, SILENCE_S)
    hello = Envelope(sender=stranger.own, message=Hello(epoch=0, receiver=member.own.incarnation))
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as plain, socket.socket() as raw:
            plain.linger = 0
            plain.connect(f"tcp://127.0.0.1:{member.own.port}")
            plain.send(hello.model_dump_json().encode())
            raw.connect(("127.0.0.1", member.own.port))
            raw.sendall(bytes(1000))
            with ThreadPoolExecutor() as threads:
                joined = threads.submit(stranger.join, [("127.0.0.1", member.own.port)], 0.3)
                with pytest.raises(CommunicationError, match=r"no connection with n1 \(127.0.0.1:\d+\) within 0.3 s"):
                    member.begin([member.own, stranger.own], 0.3)
                with pytest.raises(CommunicationError, match=r"nobody at 127.0.0.1:\d+ has taken this process in"):
                    joined.result()
        assert member.applicants == []
    finally:
        member.close()
        stranger.close()


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="the run's secret has 5 characters, at least 16 are needed"):
        Membership.open("n0", "127.0.0.1", "short", SILENCE_S)


@pytest.mark.parametrize("host", ["a..b", "x" * 250])
def test_a_name_that_no_host_can_have_is_named(host: str) -> None:
    with pytest.raises(CommunicationError, match="the host of n1, has no address"):
        address_of(Member(name="n1", host=host, port=1, incarnation="1" * 32))


def test_a_run_may_have_one_member_and_its_epochs_follow_at_once() -> None:
    member = Membership.open("n0", "127.0.0.1", SECRET, SILENCE_S)
    try:
        member.begin([member.own], 1.0)
        for number in (1, 2):
            member.end_epoch("alone")
            epoch = member.next_epoch(None, lambda members, reports: {"of": len(members)}, 1.0)
            assert (epoch.number, epoch.names, epoch.decision) == (number, ["n0"], {"of": 1})
            assert member.ending is None
    finally:
        member.close()


def test_the_next_epoch_waits_for_the_connection_to_an_applicant() -> None:
    """It is heard of before it is reached; it is given up here because its port refuses connections in the end."""
    member = Membership.open("n0", "127.0.0.1", SECRET, SILENCE_S)
    links = Links(run_keys(SECRET), SILENCE_S)
    try:
        member.begin([member.own], 1.0)
        with socket.create_server(("127.0.0.1", 0)) as unheard, ThreadPoolExecutor() as threads:
            applicant = Member(name="n1", host="127.0.0.1", port=unheard.getsockname()[1], incarnation="1" * 32)
            links.connect(member.own)
            links.send("n0", Envelope(sender=applicant, message=Application(applicant=applicant)))
            while not member.events or member.events[-1].what != "applied":
                list(links.news(0.01))
            next_epoch = threads.submit(member.next_epoch, None, lambda members, _: {"of": len(members)}, 5.0)
            with pytest.raises(TimeoutError):
                next_epoch.result(0.3)
            unheard.close()
            assert next_epoch.result().names == ["n0"]
            assert [event.name for event in member.events if event.what == "lost"] == ["n1"]
    finally:
        links.close(last_words=False)
        member.close()


def test_a_member_that_lives_and_does_not_vote_is_named() -> None:
    first, second = (Membership.open(name, "127.0.0.1", SECRET, SILENCE_S) for name in ("n0", "n1"))
    try:
        members = [first.own, second.own]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda membership: membership.begin(members, 5.0), (first, second)))
        with pytest.raises(CommunicationError, match=r"n1 did not agree on the next epoch within 0.2 s"):
            first.next_epoch(None, lambda _, __: {}, 0.2)
        assert second.ending == "n0 waits for the next epoch"
    finally:
        first.close()
        second.close()
