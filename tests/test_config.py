"""Configuration: a mapping, a TOML file, the environment. What is asked for arrives; mistakes are told with their cure."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import requests
from clocks import FakeClock
from faults import Peer, chunked, event, peer

import copilot_router
from copilot_router import (
    AnthropicProvider,
    CircuitBreaker,
    ConfigError,
    ContentFiltered,
    FailoverChain,
    GeminiProvider,
    LLMProvider,
    LLMResponse,
    LMStudioProvider,
    MemoryStore,
    OllamaProvider,
    OpenAIProvider,
    ProviderTier,
    RateLimited,
    RedisStore,
    ScriptedProvider,
    ServerError,
    SQLiteStore,
    Usage,
    main,
)

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest itself needs tomli
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

KEY = "sk-test-config-key-1234567890"
NOWHERE = "http://127.0.0.1:9/v1"
TIER = '[[tier]]\nname = "a"\nmodels = ["m"]\n'
PROVIDER = f'[tier.provider]\ntype = "openai"\nbase_url = "{NOWHERE}"\n'
GOOD = TIER + PROVIDER
AT_TIER = "[[tier]] 1 (a)"
AT_PROVIDER = "[[tier]] 1 (a) [tier.provider]"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        path = tmp_path / "router.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "inf" if value == math.inf else json.dumps(value)


# -- mistakes


class Mistake(NamedTuple):
    """A file, and what its message has to hold: where it is, what stands there, and what to write instead."""

    text: str
    place: str
    value: str
    cure: str


def of_chain(line: str, value: str, cure: str) -> Mistake:
    return Mistake(f"[chain]\n{line}\n{GOOD}", "[chain]", value, cure)


def of_tier(line: str, value: str, cure: str, place: str = AT_TIER) -> Mistake:
    return Mistake(f"{TIER}{line}\n{PROVIDER}", place, value, cure)


def of_models(models: str, value: str, cure: str) -> Mistake:
    return Mistake(f'[[tier]]\nname = "a"\nmodels = {models}\n{PROVIDER}', AT_TIER, value, cure)


def of_type(name: str, value: str, cure: str) -> Mistake:
    return Mistake(f"{TIER}[tier.provider]\n{name}\n", AT_PROVIDER, value, cure)


def of_provider(line: str, value: str, cure: str, place: str = AT_PROVIDER) -> Mistake:
    return Mistake(f"{GOOD}{line}\n", place, value, cure)


def of_address(url: str, value: str, cure: str) -> Mistake:
    return Mistake(f'{TIER}[tier.provider]\ntype = "openai"\nbase_url = {url}\n', AT_PROVIDER, value, cure)


def of_breaker(line: str, value: str, cure: str) -> Mistake:
    return Mistake(f"{GOOD}[tier.breaker]\n{line}\n", f"{AT_TIER} [tier.breaker]", value, cure)


def of_store(lines: str, value: str, cure: str) -> Mistake:
    return Mistake(f"[store]\n{lines}\n{GOOD}", "[store]", value, cure)


MISTAKES = {
    # the file
    "no TOML": Mistake("[chain\n", "line 1", "Expected ']'", "not TOML"),
    "a section misspelt": Mistake(f"[chian]\n{GOOD}", "section", "'chian'", "Did you mean 'chain'?"),
    "a section of another program": Mistake(f"[logging]\n{GOOD}", "section", "'logging'", "Known: chain, tier, store"),
    "a setting above all sections": Mistake(f"timeout = 5\n{GOOD}", "section", "'timeout'", "It belongs under [chain]"),
    "tiers as a section": Mistake(f"[tiers]\n{GOOD}", "section", "'tiers'", "Did you mean 'tier'?"),
    "no tiers": Mistake("[chain]\ntimeout = 5\n", "[[tier]]", "no tiers", "give at least one [[tier]]"),
    "single brackets": Mistake('[tier]\nname = "a"\n', "[tier]", "one table", "write [[tier]]"),
    "a chain that is no table": Mistake(f"chain = 5\n{GOOD}", "[chain]", "int", "give a table"),
    "a tier that is no table": Mistake("tier = [5]\n", "[[tier]] 1", "int", "give a table"),
    # [chain]
    "chain: a misspelt key": of_chain("timeot = 5", "'timeot'", "Did you mean 'timeout'"),
    "chain: a number as text": of_chain('timeout = "5"', "timeout='5'", "give a number of at least 0"),
    "chain: a negative number": of_chain("wait = -1", "wait=-1", "give a number of at least 0"),
    "chain: not a number": of_chain("timeout = nan", "timeout=nan", "give a number of at least 0"),
    "chain: a switch for a number": of_chain("max_retry_after = true", "max_retry_after=True", "give a number of at least 0"),
    "chain: no failures": of_chain("failure_threshold = 0", "failure_threshold=0", "give a whole number of at least 1"),
    "chain: half a failure": of_chain("failure_threshold = 1.5", "failure_threshold=1.5", "give a whole number"),
    "chain: open for ever": of_chain("recovery_timeout = inf", "recovery_timeout=inf", "give a finite number"),
    "chain: a function's name": of_chain('on_event = "print"', "on_event='print'", "in a mapping instead of a file"),
    "chain: another function": of_chain('accept = "len"', "accept='len'", "in a mapping instead of a file"),
    "chain: a clock": of_chain('clock = "time.time"', "clock='time.time'", "in a mapping instead of a file"),
    "chain: no marker": of_chain('escalation_marker = ""', "escalation_marker=''", "give a text such as '[ESCALATE]'"),
    "chain: nothing but decoration": of_chain('escalation_marker = "**"', "escalation_marker='**'", "more than decoration"),
    "chain: a marker that is no text": of_chain("escalation_marker = 3", "escalation_marker=3", "give a text"),
    "chain: an unknown stronger model": of_chain('escalation_model = "mm"', "escalation_model='mm'", "Did you mean 'm'?"),
    "chain: a number for a model": of_chain("escalation_model = 3", "escalation_model=3", "give a name, or a list of names"),
    "chain: a number for a prompt": of_chain("escalation_prompt = 3", "escalation_prompt=3", "give True, False, or a text"),
    "chain: an error misspelt": of_chain('on_error = {RateLimit = "next"}', "'RateLimit'", "Did you mean 'RateLimited'?"),
    "chain: no error at all": of_chain('on_error = {ProviderTier = "next"}', "'ProviderTier'", "no error is called"),
    "chain: an unknown action": of_chain(
        'on_error = {RateLimited = "retry"}', "on_error[RateLimited]='retry'", "give 'next' or 'raise'"
    ),
    "chain: a list of errors": of_chain('on_error = ["RateLimited"]', "on_error=['RateLimited']", "give a table"),
    "chain: tiers inside": of_chain("tiers = []", "tiers does not stand here", "write [[tier]]"),
    "chain: a store inside": of_chain('store = "x.db"', "store does not stand here", "write [store]"),
    "two tiers of one name": Mistake(GOOD + GOOD, "[chain]: tiers[1]", "'a' is taken", "names of tiers are unique"),
    # [[tier]]
    "tier: no name": Mistake(f"[[tier]]\n{PROVIDER}", "[[tier]] 1", "no name", 'give name = "local"'),
    "tier: an empty name": Mistake(f'[[tier]]\nname = " "\n{PROVIDER}', "[[tier]] 1", "name=' '", "give the tier a name"),
    "tier: a number for a name": Mistake(f"[[tier]]\nname = 1\n{PROVIDER}", "[[tier]] 1", "name=1", "give a text"),
    "tier: the second": Mistake(f'{GOOD}[[tier]]\nname = "b"\n', "[[tier]] 2 (b)", "no provider", "give a [tier.provider]"),
    "tier: a misspelt key": of_tier('model = ["x"]', "'model'", "Did you mean 'models'?"),
    "tier: a misspelt role": of_tier('role = "primry"', "role='primry'", "Did you mean 'primary'?"),
    "tier: a list of roles": of_tier('role = ["primary"]', "role=['primary']", "give a text"),
    "tier: half a retry": of_tier("retries = 0.5", "retries=0.5", "give a whole number of at least 0"),
    "tier: nobody at once": of_tier("max_concurrency = 0", "max_concurrency=0", "give a whole number of at least 1"),
    "tier: a unit of time": of_tier('timeout = "5s"', "timeout='5s'", "give a number of at least 0"),
    "tier: one price": of_tier("prices = [1.0]", "prices=[1.0]", "give (prompt, completion[, cached[, cache_write]])"),
    "tier: one price of a model": of_tier("prices = {m = 1.0}", "prices['m']=1.0", "give (prompt, completion"),
    "tier: a price as text": of_tier('prices = ["1", "2"]', "prices='1'", "give a number of at least 0"),
    "tier: yes and no as text": of_tier('supports_tools = "no"', "supports_tools='no'", "give true or false"),
    "tier: a list of options": of_tier('params = ["seed"]', "params is a list", "give a dict"),
    "tier: a misspelt option": of_tier(
        "params = {temprature = 1}", "'temprature'", "Did you mean 'temperature'?", f"{AT_TIER} [tier.params]"
    ),
    "tier: a breaker that is no table": of_tier("breaker = 3", "breaker is a int", "give a CircuitBreaker"),
    "tier: one model as text": of_models('"m"', "models='m'", "give a list"),
    "tier: an empty model": of_models('[""]', "''", "every model is a non-empty str"),
    "tier: lists of models": of_models('[["m"]]', "['m']", "every model is a non-empty str"),
    "tier: a number for a model": of_models("{m = 3}", "'m': 3", "every model is a non-empty str"),
    # [tier.provider]
    "provider: none": Mistake(TIER, AT_TIER, "no provider", 'give a [tier.provider] with type = "openai"'),
    "provider: a name only": Mistake(f'{TIER}provider = "openai"\n', AT_PROVIDER, "str", "give a table"),
    "provider: no type": of_type("", "no type", "give one of lmstudio, ollama, gemini, openai, anthropic"),
    "provider: a misspelt type": of_type('type = "opnai"', "type='opnai'", "Did you mean 'openai'?"),
    "provider: a list of types": of_type('type = ["openai"]', "type=['openai']", "give one of"),
    "provider: a key of its tier": of_provider("timeout = 5", "'timeout'", "Did you mean 'stall_timeout'"),
    "provider: no scheme": of_address('"localhost:1234"', "'localhost:1234'", "give a URL with its scheme"),
    "provider: a number for an address": of_address("3", "base_url)=3", "give a URL with its scheme"),
    "provider: a time as text": of_provider('stall_timeout = "x"', "stall_timeout='x'", "give a number"),
    "provider: no bytes": of_provider("max_response_bytes = 0", "max_response_bytes=0", "give a whole number of at least 1"),
    "provider: yes as a number": of_provider("stream_upstream = 1", "stream_upstream=1", "give true or false"),
    "provider: a session": of_provider('session = "mine"', "session='mine'", "in a mapping instead of a file"),
    "provider: a misspelt api": of_provider('api = "response"', "api='response'", "give 'auto', 'chat' or 'responses'"),
    "provider: a list of headers": of_provider('headers = ["X-Team: blue"]', "headers is a list", "give a table"),
    "provider: a number in a header": of_provider('headers = {"X-Team" = 3}', "headers['X-Team'] is a int", "give a str"),
    "provider: a list of variables": of_provider('headers_env = ["X"]', "headers_env is a list", "give a table"),
    "provider: an unset variable": of_provider('api_key_env = "NOT_SET"', "'NOT_SET'", "set it, or remove this entry"),
    "provider: an unset header": of_provider('headers_env = {"X-Key" = "NOT_SET"}', "'NOT_SET'", "set it, or remove"),
    "provider: a number for a variable": of_provider("api_key_env = 3", "api_key_env=3", "give the name of an environment"),
    "provider: an empty variable": of_provider('api_key_env = ""', "api_key_env=''", "give the name of an environment"),
    "provider: an address twice": of_provider('base_url_env = "HOME"', "both base_url and base_url_env", "give one of them"),
    # [tier.breaker]
    "breaker: a misspelt key": of_breaker("failures = 3", "'failures'", "Did you mean 'failure_threshold'?"),
    "breaker: no failures": of_breaker("failure_threshold = 0", "failure_threshold=0", "give a whole number of at least 1"),
    "breaker: shrinking": of_breaker("max_recovery_timeout = 1", "max_recovery_timeout=1", "give a number of at least 15"),
    "breaker: a number for a name": of_breaker("name = 3", "name=3", "give a text"),
    "breaker: a function's name": of_breaker('on_change = "print"', "on_change='print'", "in a mapping instead of a file"),
    "breaker: a wrong store": of_tier(
        'breaker = {store = {type = "sqlight"}}', "type='sqlight'", "Did you mean 'sqlite'?",
        f"{AT_TIER} [tier.breaker.store]"
    ),
    # [store]
    "store: a path only": Mistake(f'store = "x.db"\n{GOOD}', "[store]", "str", "give a table"),
    "store: no type": of_store('path = "x.db"', "no type", "give one of memory, sqlite, redis"),
    "store: a misspelt type": of_store('type = "sqllite"', "type='sqllite'", "Did you mean 'sqlite'?"),
    "store: no path": of_store('type = "sqlite"', "no path", 'give path = "breakers.db"'),
    "store: a number for a path": of_store('type = "sqlite"\npath = 3', "path=3", "give the path of a file"),
    "store: an unknown key": of_store('type = "sqlite"\npath = "x.db"\nfile = "y"', "'file'", "Known: path, timeout, refresh"),
    "store: a time as text": of_store('type = "sqlite"\npath = "x.db"\nrefresh = "1s"', "refresh)='1s'", "give a number"),
    "store: no address": of_store('type = "redis"', "no url", 'give url = "redis://localhost:6379/0"'),
    "store: an unset address": of_store('type = "redis"\nurl_env = "NOT_SET"', "'NOT_SET'", "set it, or remove this entry"),
    "store: yes as text": of_store(
        'type = "redis"\nurl = "redis://h"\nshared_counts = "yes"', "shared_counts='yes'", "give true or false"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file(name: str, write: Callable[[str], Path]) -> None:
    """The message holds the file, the place, the value and the cure."""
    mistake = MISTAKES[name]
    path = write(mistake.text)
    with pytest.raises(ConfigError) as error:
        FailoverChain.from_config(path)
    told = str(error.value)
    assert told.startswith(f"{path}: ")
    for part in mistake[1:]:
        assert part in told


def test_the_table_of_mistakes_is_long_enough_and_each_file_is_one_mistake_away_from_a_good_one(
    write: Callable[[str], Path],
) -> None:
    """What the mistakes are put into works, so that they are what is complained about."""
    assert len(MISTAKES) >= 30
    assert repr(FailoverChain.from_config(write(GOOD))) == "<FailoverChain a>"


@pytest.mark.parametrize("config", [3, None, [], b"router.toml"])
def test_neither_a_mapping_nor_a_path(config: Any) -> None:
    """Said by the type's name, with what to give."""
    with pytest.raises(ConfigError, match=f"a {type(config).__name__}: give a mapping, or the path of a TOML file"):
        FailoverChain.from_config(config)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing one, a directory, and one that is no text."""
    for path, why in ((tmp_path / "missing.toml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}: cannot be read \(.*{why}.*give the path"):
            FailoverChain.from_config(path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b'[[tier]]\nname = "\xe4"\n')
    with pytest.raises(ConfigError, match="not TOML"):
        FailoverChain.from_config(str(path))


def test_without_a_toml_parser(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 without tomli says what to install; a mapping needs neither."""
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ConfigError, match=r"Python 3\.11 or PyPI's tomli: pip install tomli, or give a mapping"):
        FailoverChain.from_config(write(GOOD))
    assert FailoverChain.from_config(tomllib.loads(GOOD)).tiers[0].name == "a"


def test_with_tomli(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 with tomli reads the file by it."""
    asked: list[str] = []

    def load(file: Any) -> dict[str, Any]:
        asked.append(file.name)
        return tomllib.load(file)

    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", SimpleNamespace(load=load))
    path = write(GOOD)
    assert FailoverChain.from_config(str(path)).tiers[0].name == "a"
    assert asked == [str(path)]


# -- every argument


def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """All that a constructor takes, those of its bases included where it passes them on."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__[:-1]:
        if "__init__" in vars(base):
            own = list(inspect.signature(base.__init__).parameters.values())[1:]
            found |= {item.name: item for item in own if item.kind != item.VAR_KEYWORD}
            if not any(item.kind == item.VAR_KEYWORD for item in own):
                break
    return found


def ignore(*_: Any) -> None:
    """For arguments that take a function."""


CLOCK = FakeClock()
SESSION = requests.Session()
COMMON: dict[str, Any] = {
    "api_key": KEY, "base_url": "http://127.0.0.1:9/v2", "headers": {"X-Team": "blue"}, "connect_timeout": 1.0,
    "first_token_timeout": 2.0, "stall_timeout": 3.0, "max_response_bytes": 4, "stream_upstream": False, "session": SESSION,
}  # fmt: skip
#: What each constructor is given here: every argument that it has, and none with its default.
SAMPLES: dict[type, dict[str, Any]] = {
    FailoverChain: {
        "escalation_model": ["m", "n"], "escalation_marker": "<UP>", "escalation_prompt": "Say {marker} when lost.",
        "accept": bool, "timeout": 1.5, "wait": 2.5, "max_retry_after": 3.5, "failure_threshold": 7, "recovery_timeout": 8.5,
        "on_error": {"ContentFiltered": "next", "RateLimited": "raise"}, "on_event": ignore, "clock": CLOCK,
        "sleep": CLOCK.sleep,
    },
    ProviderTier: {
        "name": "b", "models": {"fast": "n-2026"}, "role": "secondary", "timeout": 1.5, "retries": 4, "max_concurrency": 5,
        "prices": {"n-2026": [1.0, 2.0, 0.5, 1.5]}, "supports_tools": False, "supports_images": False,
        "params": {"temperature": 0.5, "extra_body": {"top_k": 3}},
    },
    CircuitBreaker: {
        "failure_threshold": 4, "recovery_timeout": 5.5, "name": "mine", "max_recovery_timeout": 60.5, "trial_timeout": 7.5,
        "clock": CLOCK, "store": {"type": "memory"}, "on_change": ignore,
    },
    OpenAIProvider: {**COMMON, "api": "responses"}, LMStudioProvider: {**COMMON, "api": "chat"},
    AnthropicProvider: COMMON, GeminiProvider: COMMON, OllamaProvider: COMMON,
    MemoryStore: {"clock": CLOCK}, SQLiteStore: {"path": "x.db", "timeout": 0.5, "refresh": 0.75},
    RedisStore: {"client_or_url": "redis://127.0.0.1:9/0", "namespace": "mine", "shared_counts": True, "timeout": 0.5,
                 "refresh": 0.75},
}  # fmt: skip
#: What the configuration gives in sections of their own.
SECTIONS = {"tiers", "store", "provider", "breaker"}
TYPES: dict[type, str] = {
    OpenAIProvider: "openai", LMStudioProvider: "lmstudio", AnthropicProvider: "anthropic", GeminiProvider: "gemini",
    OllamaProvider: "ollama", MemoryStore: "memory", SQLiteStore: "sqlite", RedisStore: "redis",
}  # fmt: skip


def config_with(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that gives these to one constructor, and to the others no more than they need."""
    typed = {"type": TYPES[kind], **settings} if kind in TYPES else {}
    provider = {"type": "openai", "base_url": NOWHERE}
    first: dict[str, Any] = {"name": "a", "models": ["m", "n"], "provider": provider}
    if issubclass(kind, LLMProvider) and kind is not FailoverChain:
        first["provider"] = typed
    if kind is CircuitBreaker:
        first["breaker"] = settings
    config: dict[str, Any] = {"tier": [first]}
    if kind is FailoverChain:
        config["chain"] = settings
    if kind is ProviderTier:
        config["tier"] = [first, {"name": "b", **settings, "provider": provider}]
    if kind in (MemoryStore, SQLiteStore, RedisStore):
        config["store"] = typed
    return config


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[type, list[dict[str, Any]]]:
    """The arguments that each constructor was really called with."""
    seen: dict[type, list[dict[str, Any]]] = {kind: [] for kind in SAMPLES}

    def watch(kind: type) -> None:
        real: Any = kind.__init__

        @functools.wraps(real)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if type(self) is kind:
                seen[kind].append(dict(kwargs))
            real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", init)

    for kind in SAMPLES:
        watch(kind)
    return seen


def given_to(kind: type, seen: Mapping[type, list[dict[str, Any]]]) -> dict[str, Any]:
    return {name: value for name, value in seen[kind][-1].items() if name in SAMPLES[kind]}


KINDS = pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)


@KINDS
def test_every_argument_has_a_sample(kind: type) -> None:
    """Nothing is left out below but what has a section of its own, and no sample is the default."""
    known = arguments_of(kind)
    own = {"store"} if kind is CircuitBreaker else set()
    assert set(SAMPLES[kind]) == set(known) - (SECTIONS - own)
    assert not [name for name, value in SAMPLES[kind].items() if known[name].default == value]


@KINDS
def test_every_argument_is_reachable_from_a_mapping(
    kind: type, built: dict[type, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, by the constructor's own name for it, objects included."""
    if kind is RedisStore:
        pytest.importorskip("redis")
    monkeypatch.chdir(tmp_path)
    required = {name: SAMPLES[kind][name] for name, item in arguments_of(kind).items()
                if item.default is item.empty and name in SAMPLES[kind]}  # fmt: skip
    base = {"base_url": NOWHERE} if "base_url" in SAMPLES[kind] else {}
    for name, value in SAMPLES[kind].items():
        needed = {"max_recovery_timeout": {"recovery_timeout": 1.0}}.get(name, {})
        settings = {**base, **required, **needed, name: value}
        FailoverChain.from_config(config_with(kind, settings))
        got = given_to(kind, built)[name]
        if name == "on_error":
            assert got == {ContentFiltered: "next", RateLimited: "raise"}
        elif name == "store":
            assert isinstance(got, MemoryStore)
        else:
            assert got == value


@KINDS
def test_every_argument_but_objects_is_reachable_from_a_file(
    kind: type, built: dict[type, list[dict[str, Any]]], write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, written as TOML; what is no key and no object arrives as it was written."""
    if kind is RedisStore:
        pytest.importorskip("redis")
    objects = {"accept", "on_event", "clock", "sleep", "on_change", "session", "api_key"}
    monkeypatch.chdir(write("").parent)
    settings = {name: value for name, value in SAMPLES[kind].items() if name not in objects}
    text = "\n".join(f"{section} = {toml(value)}" for section, value in config_with(kind, settings).items())
    FailoverChain.from_config(write(text))
    got = given_to(kind, built)
    for name in set(settings) - {"on_error", "store"}:
        assert got[name] == settings[name]
    assert set(settings) <= set(got)


def test_a_store_for_all_tiers_and_one_of_a_breakers_own(write: Callable[[str], Path], tmp_path: Path) -> None:
    """The breaker's own wins; the tier's name is the breaker's where none is given."""
    text = f"""
        [store]
        type = "sqlite"
        path = {toml(str(tmp_path / "all.db"))}
        {GOOD}
        [[tier]]
        name = "b"
        [tier.provider]
        type = "lmstudio"
        [tier.breaker.store]
        type = "sqlite"
        path = {toml(str(tmp_path / "own.db"))}
    """
    chain = FailoverChain.from_config(write(text))
    chain.tiers[0].breaker.open(60, "by hand")
    assert (tmp_path / "all.db").exists()
    assert not (tmp_path / "own.db").exists()
    chain.tiers[1].breaker.open(60, "by hand")
    assert (tmp_path / "own.db").exists()
    assert [tier.breaker.name for tier in chain.tiers] == ["a", "b"]
    again = FailoverChain.from_config(tmp_path / "router.toml")
    assert [tier.breaker.state for tier in again.tiers] == ["open", "open"]


def test_infinite_times(write: Callable[[str], Path]) -> None:
    """TOML's inf is math.inf: no limit."""
    assert FailoverChain.from_config(write(f"[chain]\ntimeout = inf\n{GOOD}")).timeout == math.inf


def test_what_is_configured_is_what_happens() -> None:
    """Aliases, parameters, prices and an error's policy, by the answers of a chain from a mapping with objects in it."""
    first = ScriptedProvider([ContentFiltered("no"), LLMResponse(content="first", usage=Usage(1_000_000, 1_000_000))])
    second = ScriptedProvider([LLMResponse(content="second", model="n-2026", usage=Usage(1_000_000, 1_000_000))])
    chain = FailoverChain.from_config({
        "chain": {"on_error": {"ContentFiltered": "next"}},
        "tier": [
            {"name": "a", "provider": first, "models": {"fast": "m-2026"}, "params": {"temperature": 0.5}, "prices": [1, 2]},
            {"name": "b", "provider": second, "models": {"fast": "n-2026"}, "prices": {"n-2026": (3.0, 4.0)}},
        ],
    })  # fmt: skip
    response = chain.chat("hi", model="fast")
    assert (response.text, response.cost) == ("second", pytest.approx(7.0))
    assert (first.calls[0]["model"], second.calls[0]["model"]) == ("m-2026", "n-2026")
    assert first.calls[0]["kwargs"]["temperature"] == 0.5
    assert "temperature" not in second.calls[0]["kwargs"]
    assert chain.chat("hi").cost == pytest.approx(3.0)


def test_objects_in_a_mapping(tmp_path: Path) -> None:
    """A provider, a whole chain, a breaker, a store and an error's class stand where a file has tables."""
    inner = FailoverChain([ProviderTier("inner", ScriptedProvider(["from within"]))])
    breaker = CircuitBreaker(1, name="mine")
    store = SQLiteStore(tmp_path / "x.db")
    chain = FailoverChain.from_config({
        "chain": {"on_error": {ServerError: "raise"}},
        "store": store,
        "tier": (
            {"name": "a", "provider": inner, "breaker": breaker},
            {"name": "b", "provider": ScriptedProvider([ServerError])},
        ),
    })  # fmt: skip
    assert chain.chat("hi").text == "from within"
    assert chain.tiers[0].breaker is breaker
    with pytest.raises(ServerError):
        chain.chat("hi", tiers=["b"])
    breaker.open(60, "by hand")
    assert store.load("mine")[0] is not None


def test_no_store_in_a_mapping() -> None:
    """None is no store, as in the constructor."""
    config = {"store": None, "tier": [{"name": "a", "provider": ScriptedProvider(["yes"])}]}
    assert FailoverChain.from_config(config).chat("hi").text == "yes"


def test_a_subclass_makes_itself() -> None:
    """from_config of a subclass is one of the subclass, with its own arguments."""

    class Mine(FailoverChain):
        def __init__(self, tiers: Any, *, colour: str = "", **settings: Any) -> None:
            super().__init__(tiers, **settings)
            self.colour = colour

    tier = {"name": "a", "provider": ScriptedProvider([])}
    chain = Mine.from_config({"chain": {"colour": "blue", "wait": 2.0}, "tier": [tier]})
    assert isinstance(chain, Mine)
    assert (chain.colour, chain.wait) == ("blue", 2.0)


def test_a_constructor_that_fails_says_where() -> None:
    """A TypeError from inside becomes a ConfigError with the place."""

    class Mine(FailoverChain):
        def __init__(self, tiers: Any) -> None:
            raise TypeError("no tiers today")

    with pytest.raises(ConfigError, match=r"^\[chain\]: no tiers today$"):
        Mine.from_config({"tier": [{"name": "a", "provider": ScriptedProvider([])}]})


# -- keys


KEY_HEADERS = (
    "Authorization", "authorization", "Proxy-Authorization", "cf-aig-authorization", "Helicone-Auth", "x-api-key", "API-Key",
    "x-goog-api-key", "Ocp-Apim-Subscription-Key", "X-Access-Token", "Cookie", "X-Client-Secret", "X-Password",
)  # fmt: skip
SECRETS: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"api_key": KEY}, 'api_key_env = "VARIABLE"'),
    "a password of the address": ({"base_url": f"http://me:{KEY}@127.0.0.1:9/v1"}, 'base_url_env = "VARIABLE"'),
    "a token for a user": ({"base_url": f"http://{KEY}@127.0.0.1:9/v1"}, 'base_url_env = "VARIABLE"'),
    "a key in the query": ({"base_url": f"http://127.0.0.1:9/v1?api-version=1&api-key={KEY}"}, 'base_url_env = "VARIABLE"'),
    **{
        f"the header {name}": ({"headers": {"X-Team": "blue", name: KEY}}, f'headers_env = {{"{name}" = "VARIABLE"}}')
        for name in KEY_HEADERS
    },
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_key_in_a_file_is_refused_and_in_a_mapping_it_may_stand(name: str, write: Callable[[str], Path]) -> None:
    """With the place and the way out, and without the key itself."""
    settings, cure = SECRETS[name]
    provider = {"type": "openai", "base_url": NOWHERE, **settings}
    path = write(f"{TIER}provider = {toml(provider)}")
    with pytest.raises(ConfigError) as error:
        FailoverChain.from_config(path)
    told = str(error.value)
    assert f"{AT_PROVIDER}: a file must not hold" in told
    assert cure in told
    assert KEY not in told
    assert FailoverChain.from_config({"tier": [{"name": "a", "provider": provider}]}).tiers[0].name == "a"


def test_headers_and_queries_that_hold_no_key_may_stand_in_a_file(write: Callable[[str], Path]) -> None:
    """Organisation, versions and such."""
    headers = {"OpenAI-Organization": "org-1", "anthropic-version": "2023-06-01", "X-Title": "mine", "X-Max-Tokens": "5"}
    provider = {"type": "openai", "base_url": "http://127.0.0.1:9/v1?api-version=2024", "headers": headers}
    assert FailoverChain.from_config(write(f"{TIER}provider = {toml(provider)}")).tiers[0].name == "a"


@pytest.mark.parametrize("name", ["url", "client_or_url"])
@pytest.mark.parametrize(
    "url",
    [f"redis://:{KEY}@127.0.0.1:9/0", f"rediss://me:{KEY}@127.0.0.1:9", f"redis://127.0.0.1:9/0?password={KEY}"],
    ids=["password", "user", "query"],
)
def test_a_password_of_redis_in_a_file_is_refused(name: str, url: str, write: Callable[[str], Path]) -> None:
    """Under either name of the argument; in a mapping it may stand."""
    with pytest.raises(ConfigError, match=r'\[store\]: a file must not hold .*: write url_env = "VARIABLE"') as error:
        FailoverChain.from_config(write(f'store = {{type = "redis", {name} = "{url}"}}\n{GOOD}'))
    assert KEY not in str(error.value)
    pytest.importorskip("redis")
    tier = {"name": "a", "provider": ScriptedProvider([])}
    assert FailoverChain.from_config({"store": {"type": "redis", name: url}, "tier": [tier]}).tiers[0].name == "a"


@pytest.mark.parametrize(
    "entry", [f'api_key_env = "{KEY}"', 'api_key_env = "AIza-lower"', f'headers_env = {{"X-Key" = "{KEY}"}}']
)
def test_a_key_where_the_name_of_a_variable_belongs_is_not_shown(entry: str, write: Callable[[str], Path]) -> None:
    """The likeliest slip of all must not end in a log."""
    with pytest.raises(ConfigError, match="not a key itself") as error:
        FailoverChain.from_config(write(f"{GOOD}{entry}\n"))
    assert KEY not in str(error.value)
    assert "AIza" not in str(error.value)


@pytest.mark.parametrize("in_file", [True, False])
def test_variables_are_read(
    in_file: bool, built: dict[type, list[dict[str, Any]]], write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, addresses and headers by the names of environment variables, in a file and in a mapping."""
    pytest.importorskip("redis")
    for name, value in (("MY_KEY", KEY), ("my_url", "http://127.0.0.1:9/x"), ("MY_HEADER", "secret"),
                        ("MY_REDIS", "redis://:pw@127.0.0.1:9")):  # fmt: skip
        monkeypatch.setenv(name, value)
    provider = {"type": "anthropic", "api_key_env": "MY_KEY", "base_url_env": "my_url", "headers": {"X-Team": "blue"},
                "headers_env": {"X-Access-Token": "MY_HEADER"}}  # fmt: skip
    config = {"store": {"type": "redis", "url_env": "MY_REDIS"}, "tier": [{"name": "a", "provider": provider}]}
    before = json.dumps(config)
    text = "\n".join(f"{name} = {toml(value)}" for name, value in config.items())
    FailoverChain.from_config(write(text) if in_file else config)
    assert built[AnthropicProvider] == [{
        "api_key": KEY, "base_url": "http://127.0.0.1:9/x", "headers": {"X-Team": "blue", "X-Access-Token": "secret"},
    }]  # fmt: skip
    assert built[RedisStore] == [{"client_or_url": "redis://:pw@127.0.0.1:9"}]
    assert json.dumps(config) == before


# -- the environment


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whoever so much as looks up a name is noted and refused."""
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        attempts.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


ENVIRONMENTS: dict[str, tuple[dict[str, str], list[tuple[str, str, list[str]]]]] = {
    "a key": ({"OPENAI_API_KEY": KEY}, [("openai", "https://api.openai.com/v1", [])]),
    "a key and a model": ({"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m"}, [("openai", "https://api.openai.com/v1", ["m"])]),
    "an address": ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, [("openai", "http://127.0.0.1:9/v1", [])]),
    "Anthropic's key": ({"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": "m"},
                        [("anthropic", "https://api.anthropic.com/v1", ["m"])]),
    "Anthropic's address": ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:9/x"}, [("anthropic", "http://127.0.0.1:9/x/v1", [])]),
    "Google's key": ({"GOOGLE_API_KEY": KEY}, [("gemini", "https://generativelanguage.googleapis.com/v1beta", [])]),
    "Gemini's key": ({"GEMINI_API_KEY": KEY, "GEMINI_MODEL": "m"},
                     [("gemini", "https://generativelanguage.googleapis.com/v1beta", ["m"])]),
    "LM Studio": ({"LMSTUDIO_BASE_URL": "http://127.0.0.1:9"}, [("lmstudio", "http://127.0.0.1:9/v1", [])]),
    "LM Studio with a model": ({"LMSTUDIO_BASE_URL": "http://127.0.0.1:9", "LMSTUDIO_MODEL": "m"},
                               [("lmstudio", "http://127.0.0.1:9/v1", ["m"])]),
    "Ollama": ({"OLLAMA_HOST": "127.0.0.1", "OLLAMA_MODEL": "m"}, [("ollama", "http://127.0.0.1:11434", ["m"])]),
    "tokens without addresses are no tiers": ({"LM_API_TOKEN": KEY, "OLLAMA_API_KEY": KEY, "OPENAI_API_KEY": KEY},
                                              [("openai", "https://api.openai.com/v1", [])]),
    "models without keys are no tiers": ({"OLLAMA_HOST": "127.0.0.1", "OPENAI_MODEL": "m", "ANTHROPIC_MODEL": "m"},
                                         [("ollama", "http://127.0.0.1:11434", [])]),
    "empty ones are not set": ({"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": ""},
                               [("anthropic", "https://api.anthropic.com/v1", [])]),
    "all of them": (
        {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY, "GEMINI_API_KEY": KEY, "OLLAMA_HOST": "127.0.0.1",
         "LMSTUDIO_BASE_URL": "http://127.0.0.1:9"},
        [("lmstudio", "http://127.0.0.1:9/v1", []), ("ollama", "http://127.0.0.1:11434", []),
         ("gemini", "https://generativelanguage.googleapis.com/v1beta", []), ("openai", "https://api.openai.com/v1", []),
         ("anthropic", "https://api.anthropic.com/v1", [])]),
}  # fmt: skip


VARIABLES = {
    "lmstudio": "LMSTUDIO_BASE_URL", "ollama": "OLLAMA_HOST", "gemini": "GOOGLE_API_KEY or GEMINI_API_KEY",
    "openai": "OPENAI_API_KEY or OPENAI_BASE_URL", "anthropic": "ANTHROPIC_API_KEY or ANTHROPIC_BASE_URL",
}  # fmt: skip


def tiers_of(chain: FailoverChain) -> list[tuple[str, str, list[str]]]:
    return [(tier.name, tier.provider.base_url, list(tier.models)) for tier in chain.tiers]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_from_env(
    name: str, no_network: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tier for each key or address, local ones first; nothing is probed; the log names what was found and what was not."""
    environ, expected = ENVIRONMENTS[name]
    with caplog.at_level(logging.INFO, "copilot_router"):
        assert tiers_of(FailoverChain.from_env(environ)) == expected
    found, _, missing = caplog.text.partition("not set:")
    names = [tier for tier, _, _ in expected]
    for tier, variable in VARIABLES.items():
        assert (f"from_env: {tier} with" in found) == (tier in names)
        assert (variable in missing.split("\n")[0]) == (tier not in names)
    for tier, _, models in expected:
        assert (f"no model: {tier.upper()}_MODEL is not set" in found) == (not models)
    assert KEY not in caplog.text
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert tiers_of(FailoverChain.from_env()) == expected
    assert no_network == []


def test_an_environment_without_a_provider(no_network: list[Any]) -> None:
    """The message names every variable that would do."""
    with pytest.raises(ConfigError) as error:
        FailoverChain.from_env({"PATH": "x"})
    assert all(names in str(error.value) for names in VARIABLES.values())
    assert no_network == []


def test_a_given_environment_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither key nor address comes from the process's own when another is given; the chain's settings pass through."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-of-the-process-0987654321")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/wrong")

    def serve(server: Peer, connection: socket.socket, request: bytes) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + chunked(event("yes", "stop"), b"data: [DONE]\n\n"))
        return True

    with peer(serve) as server, FailoverChain.from_env({"OPENAI_BASE_URL": server.url}, timeout=20) as chain:
        assert chain.timeout == 20
        assert chain.chat("hi").text == "yes"
        assert b"authorization" not in server.requests[0].lower()


# -- init


def written(path: Path, monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str]) -> str:
    """The file that init writes in an environment, which stays set."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["init", str(path)]) == 0
    return path.read_text(encoding="utf-8")


INIT = {
    "nothing": ({}, [("lmstudio", "http://localhost:1234/v1", [])]),
    "a key without a model": ({"OPENAI_API_KEY": KEY}, [("lmstudio", "http://localhost:1234/v1", [])]),
    "tokens without addresses": ({"LM_API_TOKEN": KEY, "OLLAMA_API_KEY": KEY, "OLLAMA_MODEL": "m"},
                                 [("lmstudio", "http://localhost:1234/v1", [])]),
    "a strange model": ({"OPENAI_API_KEY": KEY, "OPENAI_MODEL": 'a"\\ 🦙\x7f {x}'},
                        [("openai", "https://api.openai.com/v1", ['a"\\ 🦙\x7f {x}'])]),
    "a server without a key": ({"OPENAI_BASE_URL": "http://127.0.0.1:9", "OPENAI_MODEL": "m"},
                               [("openai", "http://127.0.0.1:9/v1", ["m"])]),
    "a server with a key": ({"OPENAI_BASE_URL": "http://127.0.0.1:9/x", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m"},
                            [("openai", "http://127.0.0.1:9/x", ["m"])]),
    "an address with a password": ({"LMSTUDIO_BASE_URL": f"http://me:{KEY}@127.0.0.1:9"},
                                   [("lmstudio", "http://127.0.0.1:9/v1", [])]),
    **{
        name: (environ, tiers)
        for name, (environ, tiers) in ENVIRONMENTS.items()
        if all(models or tier == "lmstudio" for tier, _, models in tiers)
    },
    "all of them": (
        {**ENVIRONMENTS["all of them"][0],
         **{f"{name}_MODEL": "m" for name in ("OPENAI", "ANTHROPIC", "GEMINI", "OLLAMA")}},
        [(tier, url, [] if tier == "lmstudio" else ["m"]) for tier, url, _ in ENVIRONMENTS["all of them"][1]]),
}  # fmt: skip


@pytest.mark.parametrize("name", INIT)
def test_the_file_of_init_works_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the environment it was written in it gives that environment's tiers, without a key in it, and probes nothing."""
    environ, expected = INIT[name]
    path = tmp_path / "router.toml"
    text = written(path, monkeypatch, environ)
    assert KEY not in text
    assert tiers_of(FailoverChain.from_config(path)) == expected
    said = capsys.readouterr().out
    assert f"written, with {', '.join(tier for tier, _, _ in expected)}:" in said
    assert f"--config {path}" in said
    assert no_network == []


def test_what_init_comments_out_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line that is switched off can be switched on, as the file says."""
    path = tmp_path / "router.toml"
    text = written(path, monkeypatch, {})
    for kind in ("OPENAI", "ANTHROPIC", "GOOGLE"):
        monkeypatch.setenv(f"{kind}_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    settings = r"(?m)^# (?=(\[|name =|models =|type =|path =|base_url =|api_key_env =|wait =|escalation_model =|# prices))"
    on = re.sub(settings, "", text).replace('"…"', '"name of a model"')
    on = re.sub("(?m)^# prices", "prices", on)
    path.write_text(on, encoding="utf-8")
    chain = FailoverChain.from_config(path)
    assert [tier.name for tier in chain.tiers] == ["lmstudio", "ollama", "gemini", "openai", "anthropic"]
    assert chain.wait == 120.0
    assert all(tier.prices == (0.1, 0.5) for tier in chain.tiers)
    chain.tiers[0].breaker.open(60, "by hand")
    assert (tmp_path / "copilot-router.db").exists()


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there stays as it is; a place that does not exist is said."""
    path = tmp_path / "router.toml"
    path.write_text("mine", encoding="utf-8")
    assert main(["init", str(path)]) == 2
    assert main(["init", str(tmp_path / "missing" / "router.toml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("cannot be written") == 2
    assert "name another file" in err
    assert path.read_text(encoding="utf-8") == "mine"


def test_init_writes_its_usual_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a name: copilot-router.toml, here."""
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "chat --config copilot-router.toml Hello" in capsys.readouterr().out
    assert os.listdir() == ["copilot-router.toml"]
    assert copilot_router.FailoverChain.from_config("copilot-router.toml").tiers[0].name == "lmstudio"
