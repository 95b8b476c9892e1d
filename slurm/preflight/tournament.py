"""Which pairs of ranks are measured when, and what the measurements say of nodes, links and ranks.

Pairs are measured in rounds in which nobody has two partners: N nodes need N - 1 rounds, or N if N is odd.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from slurm.preflight.findings import Finding, spell

CHECK = "network"
SLOWER = 3.0  # times the median, in each of all measurements: a clear outlier
AGAIN = 4  # times that what seems slow is measured again
FEWEST = 3  # of two, nothing tells which one is slow

Member = TypeVar("Member", bound=Hashable)
Pair = tuple[int, int]
Step = dict[str, Any]  # "pairs" of ranks that exchange, or an "all_reduce" in each of the nodes named, or of all ranks
Reports = dict[int, Any]  # of each rank its "rate" in that step, if it had a part, and the "problem" it had
Steps = Generator[Step, Reports, None]


class Rate(BaseModel):
    """A measurement."""

    bytes_per_second: float = Field(description="Of messages there and back, or bus bandwidth of an all-reduce.")
    seconds: float = Field(description="Latency: of one small message, or of an all-reduce of one number.")


class Link(Rate):
    """Between two nodes, all their ranks at once; 0 bytes per second where nothing came."""

    between: tuple[str, str]
    slowest: Pair = Field(description="The pair of ranks that took longest.")


class Inside(Rate):
    """Between the ranks of a node, two by two: the slowest pair."""

    slowest: Pair


class Network(BaseModel):
    """What was measured. Bus bandwidth as nccl-tests define it: 2 (n - 1) / n times size by time."""

    links: list[Link] = []
    inside: dict[str, Inside] = Field(default_factory=dict, description="By node.")
    all_reduce_of_node: dict[str, Rate] = Field(default_factory=dict, description="Its ranks alone, by node.")
    all_reduce: Rate | None = Field(None, description="All ranks.")
    rounds: tuple[int, int] = Field((0, 0), description="Rounds of pairs that were measured, of so many.")


def better(before: Rate | None, now: Rate) -> Rate:
    """Of two measurements of the same the faster one: what else the machines do makes some slower, none faster."""
    return now if before is None or now.bytes_per_second > before.bytes_per_second else before


class Steering:
    """Rank 0's part of the measurement.

    Args:
        nodes: name of the node of each rank.
        until: when no more rounds of pairs begin (time.monotonic).
    """

    def __init__(self, nodes: Sequence[str], until: float) -> None:
        self.nodes, self.until = nodes, until
        self.places: dict[str, list[int]] = {}
        for rank, node in enumerate(nodes):
            self.places.setdefault(node, []).append(rank)
        self.rates: dict[Pair, Rate] = {}
        self.problems: dict[Pair, str] = {}  # of pairs that failed or hung: nothing more is asked of them
        self.network = Network()
        self.findings: list[Finding] = []

    def steps(self) -> Steps:
        """What to measure next, ever; `network` and `findings` are complete at the end."""
        yield from self.pairs()
        if not self.problems:  # who failed once may do so again
            yield from self.all_reduces()

    def pairs(self) -> Steps:
        """The tournament; then what seems slow once more, while the others rest."""
        planned = far_rounds(self.places) + near_rounds(self.places)
        for done, pairs in enumerate(planned):
            if time.monotonic() > self.until:
                break
            self.take(pairs, (yield {"pairs": pairs}))
            self.network.rounds = (done + 1, len(planned))
        for _ in range(AGAIN):
            slow = slow_pairs(self.rates, self.nodes) - self.problems.keys()
            for pairs in ([pair for pair in those if pair in slow] for those in planned):
                if pairs and time.monotonic() < self.until:
                    self.take(pairs, (yield {"pairs": pairs}))
        self.network.links = links_of(self.rates, self.nodes)
        self.network.inside = inside_of(self.rates, self.nodes)
        self.findings += judge_links(self.network.links, self.nodes, self.problems)
        for ranks in self.places.values():
            own = {pair: rate for pair, rate in self.rates.items() if {*pair} <= {*ranks}}
            self.findings += judge_inside(own, self.nodes, self.problems)

    def take(self, pairs: Sequence[Pair], reports: Reports) -> None:
        """Keeps what the ranks report of their pairs, of several measurements the best."""
        for pair in pairs:
            wrong = [reports[rank]["problem"] for rank in pair if reports[rank]["problem"] is not None]
            if wrong:
                self.problems[pair] = wrong[0]
                self.rates[pair] = Rate(bytes_per_second=0, seconds=0)
                continue
            self.rates[pair] = better(self.rates.get(pair), Rate(**reports[pair[0]]["rate"]))

    def all_reduces(self) -> Steps:
        """Of the ranks of each node, then of all."""
        if any(len(ranks) > 1 for ranks in self.places.values()):
            found = self.network.all_reduce_of_node
            asked = list(self.places)
            for _ in range(1 + AGAIN):
                reports = yield {"all_reduce": asked}
                self.findings += failures(reports, self.nodes, "an all-reduce among the ranks of a node")
                for node in asked:
                    rate = reports[self.places[node][0]]["rate"]
                    if rate is not None:
                        found[node] = better(found.get(node), Rate(**rate))
                asked = slow_nodes(found)
                if self.findings or not asked:
                    break
            self.findings += judge_nodes(found)
        if len(self.nodes) > 1 and not self.findings:
            reports = yield {"all_reduce": None}
            self.findings += failures(reports, self.nodes, "an all-reduce of all ranks")
            self.network.all_reduce = Rate(**reports[0]["rate"]) if reports[0]["rate"] is not None else None


def far_rounds(places: Mapping[str, Sequence[int]]) -> list[list[Pair]]:
    """Every pair of nodes: of each the n-th rank with the n-th of the other, at the same time.

    Args:
        places: ranks of each node.
    """
    return [
        [pair for a, b in pairs for pair in zip(places[a], places[b], strict=False)] for pairs in rounds(list(places))
    ]


def near_rounds(places: Mapping[str, Sequence[int]]) -> list[list[Pair]]:
    """Every pair of ranks of a node, in all nodes at the same time."""
    own = [rounds(ranks) for ranks in places.values()]
    return [[pair for pairs in together for pair in pairs] for together in zip_longest(*own, fillvalue=[])]


def rounds(members: Sequence[Member]) -> list[list[tuple[Member, Member]]]:
    """A round-robin tournament (circle method): every pair once, nobody twice in a round."""
    seats: list[Member | None] = [*members, *([None] * (len(members) % 2))]
    made = []
    for _ in range(len(seats) - 1 if len(members) > 1 else 0):
        facing = zip(seats[: len(seats) // 2], reversed(seats), strict=False)
        made.append([(a, b) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return made


def outliers(
    rates: Mapping[tuple[Member, Member], float],
) -> tuple[dict[Member, float], dict[tuple[Member, Member], float]]:
    """Who is slow with everyone, and which pairs of the others are slow, with how many times slower than usual.

    A member counts by its best rate: a good one is fast with every good one, and slow only with a bad one. With less
    than three members nothing can be told.
    """
    members = list(dict.fromkeys(member for pair in rates for member in pair))
    if len(members) < FEWEST:
        return {}, {}
    best = {one: max(rate for pair, rate in rates.items() if one in pair) for one in members}
    usual = statistics.median(best.values())
    slow = {one: times(usual, rate) for one, rate in best.items() if rate * SLOWER < usual}
    others = {pair: rate for pair, rate in rates.items() if not slow.keys() & {*pair}}
    usual = statistics.median(others.values()) if others else 0.0
    return slow, {pair: times(usual, rate) for pair, rate in others.items() if rate * SLOWER < usual}


def times(usual: float, rate: float) -> float:
    """How many times slower; infinite where nothing came."""
    return usual / rate if rate > 0 else float("inf")


def by_nodes(rates: Mapping[Pair, Rate], nodes: Sequence[str]) -> dict[tuple[str, str], dict[Pair, Rate]]:
    """The pairs of ranks between each pair of nodes."""
    found: dict[tuple[str, str], dict[Pair, Rate]] = {}
    for pair, rate in rates.items():
        if nodes[pair[0]] != nodes[pair[1]]:
            found.setdefault((nodes[pair[0]], nodes[pair[1]]), {})[pair] = rate
    return found


def links_of(rates: Mapping[Pair, Rate], nodes: Sequence[str]) -> list[Link]:
    """Each pair of nodes: as fast as its slowest pair of ranks, times their number, for who exchanges waits for all."""
    made = []
    for between, pairs in by_nodes(rates, nodes).items():
        slowest = min(pairs, key=lambda pair: pairs[pair].bytes_per_second)
        whole = pairs[slowest].bytes_per_second * len(pairs)
        latency = max(rate.seconds for rate in pairs.values())
        made.append(Link(between=between, bytes_per_second=whole, seconds=latency, slowest=slowest))
    return made


def inside_of(rates: Mapping[Pair, Rate], nodes: Sequence[str]) -> dict[str, Inside]:
    """The slowest pair of ranks of each node."""
    made: dict[str, Inside] = {}
    for pair, rate in rates.items():
        node = nodes[pair[0]]
        if node == nodes[pair[1]] and (node not in made or rate.bytes_per_second < made[node].bytes_per_second):
            made[node] = Inside(**rate.model_dump(), slowest=pair)
    return made


def slow_pairs(rates: Mapping[Pair, Rate], nodes: Sequence[str]) -> set[Pair]:
    """Pairs of ranks on which a verdict rests, to be measured again."""
    links = {link.between: link.bytes_per_second for link in links_of(rates, nodes)}
    members, pairs = outliers(links)
    found = {
        pair
        for between, those in by_nodes(rates, nodes).items()
        if between in pairs or members.keys() & {*between}
        for pair in those
    }
    for node in dict.fromkeys(nodes):
        own = {pair: rate.bytes_per_second for pair, rate in rates.items() if {nodes[rank] for rank in pair} == {node}}
        slow, _ = outliers(own)
        found |= {pair for pair in own if slow.keys() & {*pair}}
    return found


def judge_links(links: Sequence[Link], nodes: Sequence[str], problems: Mapping[Pair, str]) -> Iterator[Finding]:
    """Names nodes that are slow with all others, and slow links between others: of a link, the node that is slower
    with the rest.
    """
    rates = {link.between: link.bytes_per_second for link in links}
    known = {link.between: link for link in links}
    if rates and not any(rates.values()):
        why = next(iter(problems.values()))
        remedy = "Check firewalls, and which interface NCCL and gloo take (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."
        names = spell(list(dict.fromkeys(nodes)))
        yield Finding(nodes[0], None, CHECK, f"the nodes {names} exchange nothing ({why}). {remedy}", "stop")
        return
    members, pairs = outliers(rates)
    for node, factor in members.items():
        worst = min((link for link in links if node in link.between), key=lambda link: link.bytes_per_second)
        yield slow_finding(node, f"exchanges {tell(factor)} with every other node", worst, problems)
    named: set[str] = set()
    for pair, factor in pairs.items():
        if not named & {*pair}:
            mean = {
                node: statistics.mean(rate for between, rate in rates.items() if node in between and between != pair)
                for node in pair
            }
            node = min(pair, key=mean.__getitem__)
            named.add(node)
            other = pair[1] if node == pair[0] else pair[0]
            yield slow_finding(node, f"exchanges {tell(factor)} with {other}", known[pair], problems)


def slow_finding(node: str, problem: str, link: Link, problems: Mapping[Pair, str]) -> Finding:
    """A node that is to be left out."""
    pace = problems.get(link.slowest, f"{link.bytes_per_second / 1e9:.3g} GB/s")
    where = f"{pace}, slowest between ranks {link.slowest[0]} and {link.slowest[1]}"
    return Finding(node, None, CHECK, f"{problem} ({where}). Have its network examined.", "bad node")


def tell(factor: float) -> str:
    """How slow, in words."""
    return "nothing" if factor == float("inf") else f"{factor:.1f} times slower than usual"


def judge_inside(rates: Mapping[Pair, Rate], nodes: Sequence[str], problems: Mapping[Pair, str]) -> Iterator[Finding]:
    """Names ranks that are slow with all others of their node, and pairs that failed."""
    members, _ = outliers({pair: rate.bytes_per_second for pair, rate in rates.items()})
    for rank, factor in members.items():
        problem = f"exchanges {tell(factor)} with every other rank of its node"
        yield Finding(nodes[rank], rank, CHECK, f"{problem}. Have the node examined.", "bad node")
    for pair in rates.keys() & problems.keys():
        if not members.keys() & {*pair}:
            problem = f"ranks {pair[0]} and {pair[1]} exchange nothing ({problems[pair]})"
            yield Finding(nodes[pair[0]], pair[0], CHECK, f"{problem}. Have the node examined.", "bad node")


def slow_nodes(rates: Mapping[str, Rate]) -> list[str]:
    """Nodes whose ranks exchange among themselves much slower than those of others."""
    usual = statistics.median(rate.bytes_per_second for rate in rates.values()) if len(rates) >= FEWEST else 0.0
    return [node for node, rate in rates.items() if rate.bytes_per_second * SLOWER < usual]


def judge_nodes(rates: Mapping[str, Rate]) -> Iterator[Finding]:
    """Names them."""
    for node in slow_nodes(rates):
        usual = statistics.median(rate.bytes_per_second for rate in rates.values())
        own = rates[node].bytes_per_second
        problem = f"an all-reduce among its ranks is {tell(times(usual, own))} ({own / 1e9:.3g} GB/s)"
        yield Finding(node, None, CHECK, f"{problem}. Have the node examined.", "bad node")


def failures(reports: Reports, nodes: Sequence[str], what: str) -> Iterator[Finding]:
    """Told of a collective that did not end, though all pairs could exchange."""
    failed = [rank for rank, report in reports.items() if report["problem"] is not None]
    if failed:
        why, where = reports[failed[0]]["problem"], spell([nodes[rank] for rank in failed])
        remedy = "Set NCCL_DEBUG=INFO and look at what NCCL says."
        yield Finding(nodes[failed[0]], None, CHECK, f"{what} fails on {where} ({why}). {remedy}", "stop")
