"""A chain from a mapping, a TOML file or the environment: what is asked for arrives, and a mistake
is told with its place and what to do."""

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
from typing import Any

import pytest
import requests
from support.fakes import error_of

from copilot_router import (AnthropicProvider, CircuitBreaker, ConfigError, ContentFiltered,
    FailoverChain, GeminiProvider, LLMProvider, LMStudioProvider, MemoryStore, OllamaProvider,
    OpenAIProvider, ProviderTier, RateLimited, RedisStore, ScriptedProvider, ServerError,
    SQLiteStore, main)

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest itself needs tomli
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

Patch, Write = pytest.MonkeyPatch, Callable[[str], Path]
KEY = "sk-test-config-key-1234567890"
NOWHERE = "http://127.0.0.1:9/v1"
TIER = '[[tier]]\nname = "a"\nmodels = ["m"]\n'
PROVIDER = f'[tier.provider]\ntype = "openai"\nbase_url = "{NOWHERE}"\n'
GOOD = TIER + PROVIDER


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        path = tmp_path / "router.toml"
        path.write_text(text, encoding="utf-8-sig")  # with a mark in front, as Windows writes it
        return path
    return to_file


def toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(name)} = {toml(item)}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "inf" if value == math.inf else json.dumps(value)


# -- mistakes
of_chain = f"[chain]\n{{}}\n{GOOD}".format
of_tier = f"{TIER}{{}}\n{PROVIDER}".format
of_provider = f"{GOOD}{{}}\n".format
of_type = f"{TIER}[tier.provider]\n{{}}\n".format
of_breaker = f"{GOOD}[tier.breaker]\n{{}}\n".format
of_store = f"[store]\n{{}}\n{GOOD}".format
IN_PROVIDER = ("[[tier]] 1", "(a)", "[tier.provider]")
IN_BREAKER = ("[[tier]] 1", "(a)", "[tier.breaker]")
#: A file with one mistake, and what its message has to hold: the place, what stands there, and the
#: nearest name where there is one. What each constructor checks is tested with the constructor.
MISTAKES: list[tuple[str, tuple[str, ...]]] = [("[chain\n", ("line 1",)),
    (f"[chian]\n{GOOD}", ("'chian'", "chain")),
    (f"[logging]\n{GOOD}", ("'logging'", "chain", "tier", "store")),
    (f"timeout = 5\n{GOOD}", ("'timeout'", "chain")), ("[chain]\ntimeout = 5\n", ("[[tier]]",)),
    ('[tier]\nname = "a"\n', ("[[tier]]",)), (f"chain = 5\n{GOOD}", ("[chain]", "int")),
    ("tier = [5]\n", ("[[tier]] 1", "int")), ("a = " + "[" * 5000 + "]" * 5000, ("TOML",)),
    (of_chain("timeot = 5"), ("[chain]", "FailoverChain", "'timeot'", "'timeout'")),
    (of_chain('timeout = "5"'), ("[chain]", "timeout='5': give a number of")),
    *((of_chain(f'{name} = "x"'), ("[chain]", name, "mapping")) for name in ("on_event", "clock")),
    (of_chain('escalation_model = "mm"'), ("[chain]", "escalation_model='mm'", "'m'")),
    (of_chain('on_error = {RateLimit = "next"}'), ("[chain]", "on_error", "'RateLimit'")),
    (of_chain('on_error = {RateLimited = "retry"}'), ("[chain]", "RateLimited", "'retry'")),
    (of_chain("tiers = []"), ("[chain]", "tiers", "[[tier]]")),
    (of_chain('store = "x.db"'), ("[chain]", "store", "[store]")),
    (GOOD + GOOD, ("[chain]", "'a'")), (f"[[tier]]\n{PROVIDER}", ("[[tier]] 1", "name")),
    (f"[[tier]]\nname = 1\n{PROVIDER}", ("[[tier]] 1", "name=1")),
    (f'{GOOD}[[tier]]\nname = "b"\n', ("[[tier]] 2", "(b)", "[tier.provider]")),
    (of_tier('model = ["x"]'), ("[[tier]] 1", "(a)", "ProviderTier", "'model'", "'models'")),
    (of_tier('role = "primry"'), ("[[tier]] 1", "role='primry'", "'primary'")),
    (of_tier('params = ["seed"]'), ("[[tier]] 1", "params", "list")),
    (of_tier("params = {temprature = 1}"), ("[tier.params]", "'temprature'", "'temperature'")),
    (of_tier("breaker = 3"), ("[[tier]] 1", "breaker", "int")),
    (f'[[tier]]\nname = "a"\nmodels = "m"\n{PROVIDER}', ("[[tier]] 1", "models='m'")),
    (TIER, ("[[tier]] 1", "(a)", "[tier.provider]")),
    (f'{TIER}provider = "openai"\n', (*IN_PROVIDER, "str")),
    (of_type(""), (*IN_PROVIDER, "type", "lmstudio, ollama, gemini, openai, anthropic")),
    (of_type('type = "opnai"'), (*IN_PROVIDER, "'opnai'", "'openai'")),
    (of_type('type = ["openai"]'), (*IN_PROVIDER, "type=['openai']")),
    (of_type('type = "openai"\nbase_url = "localhost:1"'), (*IN_PROVIDER, "as http://localhost:1")),
    (of_provider("timeout = 5"), (*IN_PROVIDER, "OpenAIProvider", "'timeout'", "'stall_timeout'")),
    (of_provider('stall_timeout = "x"'), (*IN_PROVIDER, "stall_timeout='x'")),
    (of_provider('session = "mine"'), (*IN_PROVIDER, "session", "mapping")),
    (of_provider('api = "response"'), (*IN_PROVIDER, "'response'", "'responses'")),
    (of_provider('headers = ["X-Team: blue"]'), (*IN_PROVIDER, "headers")),
    (of_provider('headers_env = ["X"]'), (*IN_PROVIDER, "headers_env")),
    (of_provider('api_key_env = "NOT_SET"'), (*IN_PROVIDER, "api_key_env", "NOT_SET")),
    (of_provider('headers_env = {"X-Key" = "NOT_SET"}'), (*IN_PROVIDER, "headers_env", "NOT_SET")),
    (of_provider("api_key_env = 3"), (*IN_PROVIDER, "api_key_env: give the name")),
    (of_provider('api_key_env = ""'), (*IN_PROVIDER, "api_key_env: give the name")),
    (of_type('type = "openai"\nbase_url = ""'), (*IN_PROVIDER, "give a URL")),
    (of_provider('base_url_env = "HOME"'), (*IN_PROVIDER, "base_url", "base_url_env")),
    (of_provider('url = "http://h"'), (*IN_PROVIDER, "'url'", "'base_url'")),
    (of_breaker("failures = 3"), (*IN_BREAKER, "CircuitBreaker", "'failure_threshold'")),
    (of_breaker('on_change = "print"'), (*IN_BREAKER, "on_change", "mapping")),
    (of_tier('breaker = {store = {type = "sqlight"}}'), (*IN_BREAKER, "'sqlight'", "'sqlite'")),
    (f'store = "x.db"\n{GOOD}', ("[store]", "str")),
    (of_store('path = "x.db"'), ("[store]", "type", "memory, sqlite, redis")),
    (of_store('type = "sqllite"'), ("[store]", "'sqllite'", "'sqlite'")),
    (of_store('type = "sqlite"'), ("[store]", "path")),
    (of_store('type = "sqlite"\npath = 3'), ("[store]", "path=3")),
    (of_tier("prices = [1.0]"), ("[[tier]] 1", "prices=[1.0]")),
    (of_tier('supports_tools = "no"'), ("[[tier]] 1", "supports_tools='no'")),
    (of_chain('escalation_marker = ""'), ("[chain]", "escalation_marker=''")),
    (of_provider('headers = {"X-Team" = 3}'), (*IN_PROVIDER, "X-Team")),
    (of_store('type = "sqlite"\npath = "x.db"\nfile = "y"'), ("[store]", "SQLiteStore", "'file'")),
    (of_store('type = "redis"'), ("[store]", "url")),
    (of_store('type = "redis"\nurl_env = "NOT_SET"'), ("[store]", "url_env", "NOT_SET"))]


@pytest.mark.parametrize(("text", "parts"), MISTAKES, ids=[text[-40:] for text, _ in MISTAKES])
def test_a_mistake_in_a_file_is_told_with_its_place(text: str, parts: Any, write: Write) -> None:
    path = write(text)
    told = str(error_of(ConfigError, FailoverChain.from_config, path))
    assert told.startswith(f"{path}: ") and [part for part in parts if part not in told] == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'[[tier]]\nname = "\xe4"\n')
    for path in (tmp_path / "missing.toml", tmp_path, latin):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            FailoverChain.from_config(str(path))
    for config in (3, None, [], b"router.toml"):
        error_of(ConfigError, FailoverChain.from_config, config, match=type(config).__name__)
    error_of(ConfigError, FailoverChain.from_config, "null\0byte.toml")


def test_without_a_toml_parser_it_says_what_to_install(write: Write, monkeypatch: Patch,
        tmp_path: Path) -> None:
    """A file can be written all the same."""
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["init", str(tmp_path / "new.toml")]) == 0
    error_of(ConfigError, FailoverChain.from_config, write(GOOD), match="pip install tomli")
    assert FailoverChain.from_config(tomllib.loads(GOOD)).tiers[0].name == "a"


# -- every argument
def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """All that a constructor takes, with what it passes on to those of its bases."""
    makers = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
    items = [item for maker in makers for item in inspect.signature(maker).parameters.values()]
    kinds = inspect.Parameter.VAR_KEYWORD
    return {item.name: item for item in items if item.name != "self" and item.kind != kinds}


def ignore(*_: Any) -> float:
    """For arguments that take a function: a clock that stands still."""
    return 1000.0


SESSION = requests.Session()
COMMON: dict[str, Any] = {"api_key": KEY, "base_url": "http://127.0.0.1:9/v2",
    "headers": {"X-Team": "blue"}, "connect_timeout": 1.0, "first_token_timeout": 2.0,
    "stall_timeout": 3.0, "max_response_bytes": 4, "stream_upstream": False, "session": SESSION}
#: What each constructor is given here: every argument that it has, and none with its default.
SAMPLES: dict[type, dict[str, Any]] = {FailoverChain: {"escalation_model": ["m", "n"],
    "escalation_marker": "<UP>", "escalation_prompt": "Up", "accept": bool, "timeout": 1.5,
    "wait": 2.5, "max_retry_after": 3.5, "failure_threshold": 7, "recovery_timeout": 8.5,
    "on_error": {"ContentFiltered": "next", "RateLimited": "raise"}, "on_event": ignore,
    "clock": ignore, "sleep": ignore}, ProviderTier: {"name": "b", "models": {"fast": "n-2026"},
        "role": "secondary", "timeout": 1.5, "retries": 4, "max_concurrency": 5,
        "prices": {"n-2026": [1.0, 2.0, 0.5, 1.5]}, "supports_tools": False,
        "supports_images": False, "params": {"temperature": 0.5, "extra_body": {"top_k": 3}}},
    CircuitBreaker: {"failure_threshold": 4, "recovery_timeout": 5.5, "name": "mine",
        "trial_timeout": 7.5, "max_recovery_timeout": 60.5, "clock": ignore,
        "store": {"type": "memory"}, "on_change": ignore, "jitter": 0.5},
    OpenAIProvider: {**COMMON, "api": "responses"}, LMStudioProvider: {**COMMON, "api": "chat"},
    AnthropicProvider: COMMON, GeminiProvider: COMMON, OllamaProvider: COMMON,
    MemoryStore: {"clock": ignore}, SQLiteStore: {"path": "x.db", "timeout": 0.5, "refresh": 0.75},
    RedisStore: {"client_or_url": "redis://127.0.0.1:9/0", "namespace": "mine",
        "shared_counts": True, "timeout": 0.5, "refresh": 0.75}}
#: What the configuration gives in sections of their own.
SECTIONS = {"tiers", "store", "provider", "breaker"}
TYPES: dict[type, str] = {OpenAIProvider: "openai", LMStudioProvider: "lmstudio",
    AnthropicProvider: "anthropic", GeminiProvider: "gemini", OllamaProvider: "ollama",
    MemoryStore: "memory", SQLiteStore: "sqlite", RedisStore: "redis"}


def config_with(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that gives these to one constructor, and the others what they need."""
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


Built = dict[type, list[dict[str, Any]]]


@pytest.fixture
def built(monkeypatch: Patch) -> Built:
    seen: Built = {kind: [] for kind in SAMPLES}
    for kind in SAMPLES:
        real: Any = kind.__init__
        def init(self: Any, *args: Any, kind: Any = kind, real: Any = real, **kwargs: Any) -> None:
            if type(self) is kind:
                seen[kind].append(dict(kwargs))
            real(self, *args, **kwargs)
        monkeypatch.setattr(kind, "__init__", functools.wraps(real)(init))
    return seen


KINDS = pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)


@KINDS
def test_every_argument_has_a_sample_other_than_its_default(kind: type) -> None:
    known = arguments_of(kind)
    own = {"store"} if kind is CircuitBreaker else set()
    assert set(SAMPLES[kind]) == set(known) - (SECTIONS - own)
    assert not [name for name, value in SAMPLES[kind].items() if known[name].default == value]


@KINDS
@pytest.mark.parametrize("in_file", [False, True], ids=["mapping", "file"])
def test_every_argument_is_reachable_by_its_own_name(kind: type, in_file: bool, built: Built,
        write: Write, monkeypatch: Patch) -> None:
    """A file holds no key and no object of Python, a mapping holds all."""
    if kind is RedisStore:
        pytest.importorskip("redis")
    monkeypatch.chdir(write("").parent)
    objects = {"accept", "on_event", "clock", "sleep", "on_change", "session", "api_key"}
    settings = {name: value for name, value in SAMPLES[kind].items()
                if not in_file or name not in objects}
    config = config_with(kind, settings)
    text = "\n".join(f"{section} = {toml(value)}" for section, value in config.items() if in_file)
    FailoverChain.from_config(write(text) if in_file else config)
    got = built[kind][-1]
    for name in settings.keys() - {"on_error", "store"}:
        assert got[name] == settings[name]
    if kind is FailoverChain:
        assert got["on_error"] == {ContentFiltered: "next", RateLimited: "raise"}
    assert kind is not CircuitBreaker or isinstance(got["store"], MemoryStore)


def test_a_store_of_a_breaker_wins_over_that_of_all_tiers(write: Write, tmp_path: Path) -> None:
    """The tier's name is the breaker's where none is given."""
    paths = [str(tmp_path / name) for name in ("all.db", "own.db")]
    stores = [toml({"type": "sqlite", "path": path}) for path in paths]
    chain = FailoverChain.from_config(write(
        f'store = {stores[0]}\n{GOOD}[[tier]]\nname = "b"\nbreaker = {{store = {stores[1]}}}\n'
        'provider = {type = "lmstudio"}'))
    chain.tiers[0].breaker.open(60, "by hand")
    assert (tmp_path / "all.db").exists() and not (tmp_path / "own.db").exists()
    chain.tiers[1].breaker.open(60, "by hand")
    assert (tmp_path / "own.db").exists()
    assert [tier.breaker.name for tier in chain.tiers] == ["a", "b"]
    again = FailoverChain.from_config(tmp_path / "router.toml")
    assert [tier.breaker.state for tier in again.tiers] == ["open", "open"]


def test_a_mapping_may_hold_objects(tmp_path: Path) -> None:
    """A provider, a chain, a breaker, a store and a class stand where a file has tables."""
    inner = FailoverChain([ProviderTier("inner", ScriptedProvider(["from within"]))])
    breaker, store = CircuitBreaker(1, name="mine"), SQLiteStore(tmp_path / "x.db")
    chain = FailoverChain.from_config({"chain": {"on_error": {ServerError: "raise"}},
        "store": store, "tier": ({"name": "a", "provider": inner, "breaker": breaker},
            {"name": "b", "provider": ScriptedProvider([ServerError])})})
    assert chain.chat("hi").text == "from within" and chain.tiers[0].breaker is breaker
    error_of(ServerError, chain.chat, "hi", tiers=["b"])
    breaker.open(60, "by hand")
    assert store.load("mine")[0] is not None


def test_from_config_of_a_subclass_makes_it_and_tells_the_place_of_its_type_error() -> None:
    class Mine(FailoverChain):
        def __init__(self, tiers: Any, *, colour: str = "", **settings: Any) -> None:
            super().__init__(tiers, **settings)
            self.colour = colour
            if colour == "none":
                raise TypeError("no colour today")
    tier = {"name": "a", "provider": ScriptedProvider([])}
    config: Any = {"store": None, "chain": {"colour": "blue", "wait": 2.0}, "tier": [tier]}
    chain = Mine.from_config(config)  # None is no store
    assert isinstance(chain, Mine) and (chain.colour, chain.wait) == ("blue", 2.0)
    config["chain"]["colour"] = "none"
    error_of(ConfigError, Mine.from_config, config, match=r"^\[chain\].*no colour today")


# -- keys
SECRETS: dict[str, dict[str, Any]] = {"api_key": {"api_key": KEY},
    "password in the address": {"base_url": f"http://me:{KEY}@127.0.0.1:9/v1"},
    "token as the user": {"base_url": f"http://{KEY}@127.0.0.1:9/v1"},
    "key in the query": {"base_url": f"http://127.0.0.1:9/v1?api-version=1&api-key={KEY}"},
    **{name: {"headers": {"X-Team": "blue", name: KEY}}
        for name in ("authorization", "Proxy-Authorization", "Helicone-Auth", "x-api-key",
            "API-Key", "X-Access-Token", "Cookie", "X-Client-Secret", "X-Password")}}


@pytest.mark.parametrize("name", SECRETS)
def test_a_key_in_a_file_is_refused_unseen_and_taken_in_a_mapping(name: str, write: Write) -> None:
    provider = {"type": "openai", "base_url": NOWHERE, **SECRETS[name]}
    path = write(f"{TIER}provider = {toml(provider)}")
    told = str(error_of(ConfigError, FailoverChain.from_config, path, match="_env"))
    assert all(part in told for part in IN_PROVIDER) and KEY not in told
    tier = {"name": "a", "provider": provider}
    assert FailoverChain.from_config({"tier": [tier]}).tiers[0].name == "a"


def test_headers_and_queries_without_a_key_may_be_in_a_file(write: Write) -> None:
    headers = {"OpenAI-Organization": "org-1", "anthropic-version": "2023-06-01",
               "X-Title": "mine", "X-Max-Tokens": "5", "accept": "text/event-stream"}
    url = "http://127.0.0.1:9/v1?api-version=2024"
    provider = {"type": "openai", "base_url": url, "headers": headers}
    chain = FailoverChain.from_config(
        write(f"[chain]\ntimeout = inf\n{TIER}provider = {toml(provider)}"))
    assert (chain.tiers[0].name, chain.timeout) == ("a", math.inf)


@pytest.mark.parametrize("name", ["url", "client_or_url"])
@pytest.mark.parametrize("url",
    [f"redis://:{KEY}@127.0.0.1:9/0", f"redis://127.0.0.1:9/0?password={KEY}"])
def test_a_password_of_redis_in_a_file_is_refused_unseen(name: str, url: str, write: Write) -> None:
    path = write(f'store = {{type = "redis", {name} = "{url}"}}\n{GOOD}')
    error = error_of(ConfigError, FailoverChain.from_config, path, match=r"\[store\].*url_env")
    assert KEY not in str(error)
    pytest.importorskip("redis")
    store, tier = {"type": "redis", name: url}, {"name": "a", "provider": ScriptedProvider([])}
    assert FailoverChain.from_config({"store": store, "tier": [tier]}).tiers[0].name == "a"


@pytest.mark.parametrize("entry",
    [f'api_key_env = "{KEY}"', 'api_key_env = "AIza-x"', f'headers_env = {{"X-Key" = "{KEY}"}}'])
def test_a_key_where_the_name_of_a_variable_belongs_is_not_shown(entry: str, write: Write) -> None:
    path = write(f"{GOOD}{entry}\n")
    told = str(error_of(ConfigError, FailoverChain.from_config, path, match="_env"))
    assert KEY not in told and "AIza" not in told


@pytest.mark.parametrize("in_file", [True, False])
def test_variables_are_read_in_a_file_and_in_a_mapping(in_file: bool, built: Built,
        write: Write, monkeypatch: Patch) -> None:
    pytest.importorskip("redis")
    environ = {"MY_KEY": KEY, "my_url": "http://127.0.0.1:9/x", "MY_HEADER": "secret",
               "MY_REDIS": "redis://:pw@127.0.0.1:9"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    provider = {"type": "anthropic", "api_key_env": "MY_KEY", "base_url_env": "my_url",
        "headers": {"X-Team": "blue"}, "headers_env": {"X-Access-Token": "MY_HEADER"}}
    tiers = [{"name": "a", "provider": provider}]
    config = {"store": {"type": "redis", "url_env": "MY_REDIS"}, "tier": tiers}
    before = json.dumps(config)
    text = "\n".join(f"{name} = {toml(value)}" for name, value in config.items())
    FailoverChain.from_config(write(text) if in_file else config)
    assert built[AnthropicProvider] == [{"api_key": KEY, "base_url": "http://127.0.0.1:9/x",
        "headers": {"X-Team": "blue", "X-Access-Token": "secret"}}]
    assert built[RedisStore] == [{"client_or_url": "redis://:pw@127.0.0.1:9"}]
    assert json.dumps(config) == before


# -- the environment
@pytest.fixture
def no_network(monkeypatch: Patch) -> list[Any]:
    attempts: list[Any] = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *args, **_: attempts.append(args))
    return attempts


OPENAI, ANTHROPIC = "https://api.openai.com/v1", "https://api.anthropic.com/v1"
GOOGLE, LOCAL = "https://generativelanguage.googleapis.com/v1beta", "http://127.0.0.1:9"
#: Variables, and the tiers that they make: name, address, models.
ENVIRONMENTS: list[tuple[dict[str, str], list[tuple[str, str, list[str]]]]] = [
    ({"OPENAI_API_KEY": KEY}, [("openai", OPENAI, [])]),
    ({"OPENAI_API_KEY": KEY, "OPENAI_MODEL": "m"}, [("openai", OPENAI, ["m"])]),
    ({"OPENAI_BASE_URL": LOCAL}, [("openai", f"{LOCAL}/v1", [])]),
    ({"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": "m"}, [("anthropic", ANTHROPIC, ["m"])]),
    ({"ANTHROPIC_BASE_URL": f"{LOCAL}/x"}, [("anthropic", f"{LOCAL}/x/v1", [])]),
    ({"GOOGLE_API_KEY": KEY}, [("gemini", GOOGLE, [])]),
    ({"GEMINI_API_KEY": KEY, "GEMINI_MODEL": "m"}, [("gemini", GOOGLE, ["m"])]),
    ({"LMSTUDIO_BASE_URL": LOCAL}, [("lmstudio", f"{LOCAL}/v1", [])]),
    ({"LMSTUDIO_BASE_URL": LOCAL, "LMSTUDIO_MODEL": "m"}, [("lmstudio", f"{LOCAL}/v1", ["m"])]),
    ({"OLLAMA_HOST": "127.0.0.1", "OLLAMA_MODEL": "m"}, [("ollama", f"{LOCAL[:-1]}11434", ["m"])]),
    # A token without the address of its server makes no tier, nor does a model without a key.
    ({"LM_API_TOKEN": KEY, "OLLAMA_API_KEY": KEY, "OPENAI_API_KEY": KEY}, [("openai", OPENAI, [])]),
    ({"OPENAI_API_KEY": KEY, "ANTHROPIC_MODEL": "m"}, [("openai", OPENAI, [])]),
    # An empty variable is not set.
    ({"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_MODEL": ""},
     [("anthropic", ANTHROPIC, [])]),
    ({"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY, "GEMINI_API_KEY": KEY,
      "OLLAMA_HOST": "127.0.0.1", "LMSTUDIO_BASE_URL": LOCAL},
     [("lmstudio", f"{LOCAL}/v1", []), ("ollama", f"{LOCAL[:-1]}11434", []), ("gemini", GOOGLE, []),
      ("openai", OPENAI, []), ("anthropic", ANTHROPIC, [])])]
#: The tiers that from_env may make, and the variables that make them.
VARIABLES = {"lmstudio": ["LMSTUDIO_BASE_URL"], "ollama": ["OLLAMA_HOST"],
    "gemini": ["GOOGLE_API_KEY", "GEMINI_API_KEY"], "openai": ["OPENAI_API_KEY", "OPENAI_BASE_URL"],
    "anthropic": ["ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"]}


def tiers_of(chain: FailoverChain) -> list[tuple[str, str, list[str]]]:
    providers: list[Any] = [tier.provider for tier in chain.tiers]
    return [(tier.name, provider.base_url, list(tier.models))
            for tier, provider in zip(chain.tiers, providers, strict=True)]


@pytest.mark.parametrize(("environ", "expected"), ENVIRONMENTS)
def test_from_env_makes_a_tier_of_each_key_or_address_and_probes_nothing(environ: dict[str, str],
        expected: list[Any], no_network: list[Any], caplog: Any, monkeypatch: Patch) -> None:
    """Neither does it look at the environment of the process when another one is given."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/wrong")
    with caplog.at_level(logging.INFO, "copilot_router"):
        assert tiers_of(FailoverChain.from_env(environ)) == expected
    monkeypatch.delenv("OPENAI_BASE_URL")
    names = [tier for tier, _, _ in expected]
    for tier, variables in VARIABLES.items():
        assert tier in names or all(variable in caplog.text for variable in variables)
    for tier, _, models in expected:
        assert tier in caplog.text and (f"{tier.upper()}_MODEL" in caplog.text) == (not models)
    assert KEY not in caplog.text
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert (tiers_of(FailoverChain.from_env()), no_network) == (expected, [])


# -- init
def written(path: Path, monkeypatch: Patch, environ: Mapping[str, str]) -> str:
    """The file that init writes in an environment, which stays set."""
    monkeypatch.setattr(os, "environ", {**os.environ, **environ})  # of any letters
    assert main(["init", str(path)]) == 0
    return path.read_text(encoding="utf-8")


STRANGE = 'a"\\ 🦙 {x}'
LM_STUDIO = ("lmstudio", "http://localhost:1234/v1", [])
INIT = [*ENVIRONMENTS, ({}, [LM_STUDIO]),
    ({"LM_API_TOKEN": KEY, "OLLAMA_API_KEY": KEY, "OLLAMA_MODEL": "m"}, [LM_STUDIO]),
    ({"OPENAI_API_KEY": KEY, "OPENAI_MODEL": STRANGE}, [("openai", OPENAI, [STRANGE])]),
    ({"OPENAI_BASE_URL": f"{LOCAL}/x", "OPENAI_API_KEY": KEY}, [("openai", f"{LOCAL}/x", [])]),
    ({"LMSTUDIO_BASE_URL": f"http://me:{KEY}@127.0.0.1:9"}, [("lmstudio", f"{LOCAL}/v1", [])])]


@pytest.mark.parametrize(("environ", "expected"), INIT, ids=[" ".join(env) for env, _ in INIT])
def test_init_writes_the_tiers_of_the_environment_without_keys_and_shows_gaps(
        environ: dict[str, str], expected: list[Any], tmp_path: Path, no_network: list[Any],
        monkeypatch: Patch, capsys: Any) -> None:
    path = tmp_path / "router.toml"
    text = written(path, monkeypatch, environ)
    held = any(KEY in value for name, value in environ.items() if name.endswith("_URL"))
    assert KEY not in text and ("base_url_env" in text) == held
    assert tiers_of(FailoverChain.from_config(path)) == expected
    said = capsys.readouterr().out
    assert f"--config {path}" in said
    gaps = [tier for tier, _, models in expected if not models and tier != "lmstudio"]
    switched_on = re.findall(r"(?m)^\[\[tier\]\]\nname = \"(.*)\"\nmodels = .*FILL IN", text)
    assert (switched_on, "Fill in" in said) == (gaps, bool(gaps))
    assert all(tier in said for tier, _, _ in expected) and no_network == []


def test_what_init_comments_out_works_when_switched_on(tmp_path: Path, monkeypatch: Patch) -> None:
    text = written(tmp_path / "router.toml", monkeypatch, {})
    for kind in ("OPENAI", "ANTHROPIC", "GOOGLE"):
        monkeypatch.setenv(f"{kind}_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    on = re.sub(r"(?m)^# (?=\[|(# )?[a-z_]+ = )", "", text)
    on = re.sub(r"(?m)^# (?=prices = )", "", on).replace('"…"', '"m"')
    on = on.replace("models = []", 'models = ["m"]')
    (tmp_path / "all.toml").write_text(on, encoding="utf-8")
    chain = FailoverChain.from_config("all.toml")
    assert ([tier.name for tier in chain.tiers], chain.wait) == (list(VARIABLES), 120.0)
    assert all(len(tier.prices) == 2 for tier in chain.tiers)
    chain.tiers[0].breaker.open(60, "by hand")
    assert (tmp_path / "copilot-router.db").exists()


def test_init_overwrites_nothing(tmp_path: Path, monkeypatch: Patch, capsys: Any) -> None:
    mine = tmp_path / "router.toml"
    mine.write_text("mine", encoding="utf-8")
    assert main(["init", str(mine)]) == 2
    assert main(["init", str(tmp_path / "missing" / "router.toml")]) == 2
    monkeypatch.setenv("OLLAMA_HOST", "h\udcffst")  # what Python makes of a byte that is not UTF-8
    assert main(["init", str(tmp_path / "new.toml")]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)
    assert f"{mine}: cannot be written (File exists)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["router.toml"]
    assert mine.read_text(encoding="utf-8") == "mine"
