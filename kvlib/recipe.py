"""Recipes: one choice per role, written as a string or a dataclass, checked before anything runs."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from math import lcm
from typing import Any, NoReturn

import numpy as np

import kvlib.policies  # noqa: F401  (registers the methods)
from kvlib.policies.base import (
    BudgetedEvictor,
    Composition,
    Evictor,
    HeadSplit,
    Method,
    Needs,
    RecipeError,
    Sizes,
    check_whole,
    parameters,
    registered,
)
from kvlib.policies.encoding import Codec
from kvlib.policies.notation import build, method_of, nearest, read_call, read_value, split
from kvlib.policies.selection import Selector
from kvlib.policies.tier.host import Host

ROLES = ("heads", "evict", "select", "codec", "tier", "prefill")
_SIZES = ("sink", "recent", "block")
_PREFILLS = ("dense",)


@dataclass(frozen=True)
class Recipe:
    """One choice per role: which heads form groups, what is evicted, read, encoded, where it lives, how prompts attend.

    heads: a `HeadSplit` or None.  evict: an `Evictor` or None (keep everything).  select: a `Selector` or None (read
    everything).  codec: a `Codec` or None (keep it as it is).  tier: a `Host`, or None: the body stays on the device.
    prefill: "dense".
    sink, recent, block: sizes in tokens that override what the evictor or the selector would choose from its budget.

    Raises RecipeError where the combination cannot work.
    """

    heads: HeadSplit | None = None
    evict: Evictor | None = None
    select: Selector | None = None
    codec: Codec | None = None
    tier: Host | None = None
    prefill: str = "dense"
    sink: int | None = None
    recent: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        kinds = {"heads": HeadSplit, "evict": Evictor, "select": Selector, "codec": Codec, "tier": Host}
        for role, kind in kinds.items():
            value = getattr(self, role)
            if value is not None and not isinstance(value, kind):
                raise RecipeError("recipe", role, value, f"give a method of the role {role!r} or None")
        if self.prefill not in _PREFILLS:
            raise RecipeError("recipe", "prefill", self.prefill, f"give one of {', '.join(_PREFILLS)}")
        for size in _SIZES:
            if getattr(self, size) is not None:
                check_whole("recipe", size, getattr(self, size), 1 if size == "block" else 0)
        if self.select is not None and self.evictor is not None:
            self._check_pair(self.evictor, self.select)
        if self.tier is not None:
            self._check_tier(self.tier)
        for codec in () if self.codec is None else self.codec.members():
            self._check_codec(codec)
        if self.codec is not None and self.select is not None:
            self._check_choice(self.codec, self.select)
        self._check_sizes()

    def _check_pair(self, evict: Evictor, select: Selector) -> None:
        """An evictor and a selector go together where the evictor acts once, before units are formed."""
        if self.evict is not None and select.evictor() is not None:
            remedy = f"it evicts by itself, and so does {evict.name}: leave one out (sentencekv(r=inf) evicts nothing)"
            raise RecipeError(select.name, None, None, remedy)
        if evict.when == "online":
            remedy = (
                f"it chooses among units that stay, and {evict.name} drops single tokens of them while decoding: use an "
                "evictor that acts once, when the prompt ends (h2o_prefill, snapkv)"
            )
            raise RecipeError(select.name, None, None, remedy)
        if select.scope == "layer":
            remedy = f"after {evict.name} a layer's heads hold different tokens and cannot share a list: give scope=kv_head"
            raise RecipeError(select.name, "scope", select.scope, remedy)
        if getattr(evict, "adaptive", False):
            remedy = f"{evict.name}(adaptive=True) leaves each head another number of tokens to choose from: leave it out"
            raise RecipeError(select.name, None, None, remedy)
        if select.run > 1:
            remedy = f"its pages need neighbouring tokens, and {evict.name} leaves gaps: use clusterkv or sentencekv"
            raise RecipeError(select.name, None, None, remedy)
        if select.requirements().products:
            remedy = f"it calibrates on the whole prompt, of which {evict.name} keeps a part: use clusterkv or sentencekv"
            raise RecipeError(select.name, None, None, remedy)

    def _check_tier(self, tier: Host) -> None:
        if self.evict is not None and self.evict.bodiless:
            remedy = f"{self.evict.name} keeps nothing between its first and its newest tokens: leave '@ host' out"
            raise RecipeError("host", None, None, remedy)
        if self.select is None:
            return
        if self.select.scope == "query_head":
            remedy = "the query heads of a KV head would each fetch a list of their own: leave scope out"
            raise RecipeError(self.select.name, "scope", self.select.scope, remedy)
        if self.select.reads_keys and tier.attend:
            remedy = f"{self.select.name} reads every key at every step, so its keys stay on the device: use '@ host'"
            raise RecipeError("host", "attend", True, remedy)

    def _check_codec(self, codec: Codec) -> None:
        """A codec goes with what asks for no less than it can give: blocks to evict, tokens to read."""
        evict, select, grain = self.evictor, self.select, codec.grain
        if evict is not None and evict.when == "online" and not all(form.alone for form in codec.forms()):
            why = (
                f"seals {grain} tokens at a time, so" if grain > 1 else "encodes tokens by what they share with others, so"
            )
            remedy = (
                f"{codec.name} {why} online {evict.name} cannot evict single tokens from its blocks: use a codec of single "
                "tokens (kv4), or h2o_prefill or snapkv, which evict before sealing"
            )
            raise RecipeError(codec.name, None, None, remedy)
        if evict is not None and evict.bodiless:
            remedy = f"{evict.name} keeps nothing between its first and its newest tokens: use window(budget=...)"
            raise RecipeError(codec.name, None, None, remedy)
        if evict is not None and evict.when == "prefill_end" and getattr(evict, "adaptive", False):
            remedy = f"{evict.name}(adaptive=True) leaves each head another number of tokens to encode: leave it out"
            raise RecipeError(codec.name, None, None, remedy)
        unreadable = max(form.read_granularity for form in codec.forms())
        if select is not None and unreadable > 1 and (select.run % unreadable or not select.run):
            remedy = (
                f"it is read {unreadable} tokens at a time, and {select.name} reads fewer: use pages of as many (quest), "
                "or a codec such as kv4 or kivi"
            )
            raise RecipeError(codec.name, None, None, remedy)
        if select is not None and grain > 1 and select.run == 0 and not select.fitted:
            remedy = (
                f"{codec.name} encodes {grain} tokens together, and {select.name}'s units end anywhere: use a codec of "
                "single tokens (kv4, rotated, mustafar)"
            )
            raise RecipeError(codec.name, None, None, remedy)
        if any(form.cold for form in codec.forms()) and self.tier is None:
            raise RecipeError(codec.name, None, None, "it is for tokens that are rarely read: write '@ host' after it")
        if self.block is not None and self.block % grain:
            raise RecipeError(
                "recipe", "block", self.block, f"{codec.name} encodes {grain} tokens together: give a multiple of it"
            )
        budget = None if select is None else select.budget
        if select is not None and grain > 1 and isinstance(budget, int):
            step = lcm(grain, max(1, select.run))
            if budget < 2 * step:
                remedy = f"{codec.name} seals {step} tokens at a time: give budget={2 * step} or more, or smaller groups"
                raise RecipeError(select.name, "budget", budget, remedy)

    def _check_choice(self, codec: Codec, select: Selector) -> None:
        """What a codec says of more than one token must not contradict the selector."""
        if codec.by_head and select.scope == "layer":
            remedy = f"heads of a layer that {codec.name} keeps in unlike forms cannot share a list: give scope=kv_head"
            raise RecipeError(select.name, "scope", select.scope, remedy)
        if codec.recent != type(codec).recent:
            remedy = (
                f"the budget of {select.name} decides how many tokens stay dense: write '+ recent={codec.recent}' instead"
            )
            raise RecipeError(codec.name, "recent", codec.recent, remedy)

    def _check_sizes(self) -> None:
        written = [size for size in _SIZES if getattr(self, size) is not None]
        chooser = self.evict if self.select is None else self.select
        if chooser is None:
            if written and self.tier is None and self.codec is None:
                value = getattr(self, written[0])
                raise RecipeError("recipe", written[0], value, "nothing is evicted or selected: leave it out")
            return
        if self.block is not None and isinstance(chooser, Evictor) and chooser.when == "prefill_end":
            remedy = f"{chooser.name} evicts once, when the prompt ends, and has no blocks: leave it out"
            raise RecipeError("recipe", "block", self.block, remedy)
        budget = getattr(chooser, "budget", None)
        if isinstance(chooser, BudgetedEvictor | Selector) and isinstance(budget, int):
            taken = sum(getattr(self, size) or 0 for size in written)
            if taken > budget:
                remedy = f"{' + '.join(f'{s}={getattr(self, s)}' for s in written)} exceed it: give {taken} or more"
                raise RecipeError(chooser.name, "budget", budget, remedy)
        split = chooser.split(np.ones(1, dtype=np.int64), self.sizes)
        if isinstance(chooser, Selector) and isinstance(budget, int):
            for size in written:
                found, asked = int(getattr(split, size)[0]), getattr(self, size)
                if found != asked:
                    remedy = f"within budget={budget} it could be {found} at most: give that, or a larger budget"
                    if size == "block" and asked % max(1, chooser.run):
                        remedy = f"pages have {chooser.run} tokens: give a multiple of it"
                    raise RecipeError("recipe", size, asked, remedy)

    @property
    def evictor(self) -> Evictor | None:
        """What evicts: the evictor, or what the selector gives up by itself."""
        return self.select.evictor() if self.evict is None and self.select is not None else self.evict

    def needs(self) -> dict[str, Needs]:
        """What each method must be given, by its name."""
        found = {} if self.evictor is None else {self.evictor.name: self.evictor.requirements()}
        return found if self.select is None else {**found, self.select.name: self.select.requirements()}

    @property
    def sizes(self) -> Sizes:
        """The sizes this recipe prescribes."""
        return Sizes(self.sink, self.recent, self.block, 1 if self.codec is None else self.codec.grain)

    @property
    def lossy(self) -> bool:
        """Whether a token can be given up for good; codecs keep every token, if not to the bit."""
        streams = self.heads is not None and self.heads != self.heads.unlimited()
        return streams or (self.evictor is not None and self.evictor.evicts())

    @property
    def dense_prompt(self) -> bool:
        """Whether a prompt read in one piece is attended as `full` attends it, so that several recipes can share it."""
        evictors = [self.evictor, self.heads.streaming() if self.heads else None]
        return all(evictor is None or evictor.band(prompt=True) == (None, 0) for evictor in evictors)

    @property
    def chunk_invariant(self) -> bool:
        """Whether a prompt fed in chunks gives what the whole prompt gives."""
        evictors = [self.evictor, self.heads.streaming() if self.heads else None]
        return all(evictor is None or evictor.chunk_invariant for evictor in evictors)

    def unlimited(self) -> Recipe:
        """The same recipe with so much budget that nothing is given up; by contract the same bits as `full`."""
        heads = None if self.heads is None else self.heads.unlimited()
        evict = None if self.evict is None else self.evict.unlimited()
        select = None if self.select is None else self.select.unlimited()
        plain = dataclasses.replace(
            self, heads=heads, evict=evict, select=select, codec=None, sink=None, recent=None, block=None
        )
        sizes = {} if (evict or select or self.tier) is None else {size: getattr(self, size) for size in _SIZES}
        return dataclasses.replace(plain, **sizes)

    def __str__(self) -> str:
        terms = [str(method) for method in (self.heads, self.evict, self.select, self.codec) if method is not None]
        terms += [f"{size}={getattr(self, size)}" for size in _SIZES if getattr(self, size) is not None]
        where = "" if self.tier is None else f" @ {self.tier}"
        return (" + ".join(terms) or "full") + where

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """Read `"method(argument=value, ...) + method + sink=4"`; `Recipe.parse(str(recipe)) == recipe`.

        Values are Python literals or bare words (paths).  `@ host` or `@ device` names the tier.  Raises RecipeError.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):
            raise RecipeError("recipe", None, text, f'give a string such as "h2o(budget=256)", not {text!r}')
        body, tier = _split_tier(text)
        roles: dict[str, Any] = {}
        for term in split(body, "+"):
            for role, value in _term(term.strip(), text):
                if role in roles:
                    _refuse_second(role, roles[role], value)
                roles[role] = value
        if tier == "device":
            roles.pop("tier", None)
        elif tier is not None:
            roles["tier"] = _tier(tier, text)
        return cls(**roles)


def methods() -> list[dict[str, Any]]:
    """What exists: name, role, paper (arXiv id), lossy or not, idea and parameters of every method."""
    rows = [
        {
            "name": "full",
            "role": "evict",
            "paper": "",
            "lossy": False,
            "idea": "Keep and read every token.",
            "parameters": {},
        }
    ]
    for name, method in sorted(registered().items()):
        rows.append(
            {
                "name": name,
                "role": method.role,
                "paper": method.paper,
                "lossy": _is_lossy(method),
                "idea": method.idea(),
                "parameters": parameters(method),
            }
        )
    return rows


def _is_lossy(method: type[Method]) -> bool:
    """Whether something is given up: tokens, or what they were to the bit; a composition gives up what its parts do."""
    if issubclass(method, Composition):
        return any(_is_lossy(type(part)) for part in method().parts())
    return not method.lossless_recall or (issubclass(method, Codec) and not method.exact)


def _term(term: str, text: str) -> list[tuple[str, Any]]:
    """One term of a recipe as (role, value) pairs: none for `full`, several for a method that is a composition."""
    size = re.fullmatch(r"(\w+)\s*=\s*(.*)", term, re.DOTALL)
    if size:
        if size[1] not in _SIZES:
            raise RecipeError("recipe", size[1], size[2], nearest(size[1], _SIZES, "size"))
        return [(size[1], read_value(size[2]))]
    name, arguments = read_call(term, text)
    if name == "full":
        if arguments.strip():
            raise RecipeError("full", None, arguments, f"takes no arguments, not {arguments!r}: write full")
        return []
    if name in _tiers():
        raise RecipeError(name, None, name, f"it is a tier: write it last, as '@ {name}'")
    method = method_of(term)
    parts = method.parts() if isinstance(method, Composition) else (method,)
    return [(part.role, part) for part in parts]


def _tier(term: str, text: str) -> Any:
    """The tier written after `@`."""
    name, arguments = read_call(term, text)
    known = _tiers()
    if name not in known:
        raise RecipeError("recipe", "tier", term, nearest(name, [*known, "device"], "tier"))
    return build(known[name], arguments)


def _tiers() -> dict[str, type[Method]]:
    return {key: method for key, method in registered().items() if method.role == "tier"}


def _split_tier(text: str) -> tuple[str, str | None]:
    body, *tiers = split(text, "@")
    if len(tiers) > 1:
        raise RecipeError(repr(text), None, text, "names two tiers: write one '@ tier' at the end")
    return body, tiers[0].strip() if tiers else None


def _refuse_second(role: str, first: Any, second: Any) -> NoReturn:
    if role in _SIZES:
        raise RecipeError("recipe", role, second, "given twice: leave one out")
    what = {
        "evict": "evictors: what one drops the other cannot rank",
        "heads": "head splits: a head has one group",
        "select": "selectors: a query reads one choice",
        "codec": 'codecs: kv(k="...", v="...") takes one for keys and one for values',
    }
    names = f"{first.name} and {second.name}"
    raise RecipeError(names, None, names, f"both are {what[role]}; a recipe takes one")
