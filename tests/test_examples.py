"""Every recipe runs: its own chain, the real provider classes, fake vendors on loopback, the frameworks themselves."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from clocks import FakeClock
from vendors import KEY, Chat, Raw, Reply

import copilot_router
from copilot_router import AllProvidersFailed, AuthenticationError, ModelNotFound, RateLimited

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

BROKEN = Raw({"error": {"message": "out of order"}}, 500)
BUSY = Raw({"error": {"message": "slow down"}}, 429, headers={"Retry-After": "30"})


class Machine(NamedTuple):
    """What the recipes find: a server of LM Studio's kind, and the cloud."""

    local: Chat
    cloud: Chat
    environment: dict[str, str]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two servers that answer "ok" until told otherwise, named by the environment as a user's would be."""
    with Chat(local=True) as local, Chat(models=("gpt-6-luna",)) as cloud:
        names = {"LMSTUDIO_BASE_URL": local.url, "LM_API_TOKEN": KEY, "OPENAI_BASE_URL": cloud.url, "OPENAI_API_KEY": KEY}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        yield Machine(local, cloud, names)


def example(name: str) -> Any:
    """A fresh import of a recipe."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which finds the module, the recipes and the test helpers."""
    path = os.pathsep.join(map(str, (Path(copilot_router.__file__).parent, EXAMPLES, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def both(machine: Machine, answer: Raw, times: int = 8) -> None:
    machine.local.script.extend([answer] * times)
    machine.cloud.script.extend([answer] * times)


# ==== Flask ===========================================================================================================


def test_flask_answers_fails_over_and_says_who_answered(machine: Machine) -> None:
    """The view returns the first tier's answer, and the second's while the first is out of order."""
    pytest.importorskip("flask")
    client = example("flask_view").create_app().test_client()
    assert client.post("/ask", json={"question": "hi"}).json == {"answer": "ok", "by": "local"}
    machine.local.script.extend([BROKEN, BROKEN])
    machine.cloud.script.append(Reply("from afar"))
    assert client.post("/ask", json={"question": "hi"}).json == {"answer": "from afar", "by": "cloud"}


def test_flask_turns_retry_after_into_a_503_and_the_health_endpoint_follows(machine: Machine) -> None:
    """Both tiers are parked for 30 s: the visitor is told so, and the load balancer too, until somebody resets."""
    pytest.importorskip("flask")
    module = example("flask_view")
    chain = module.make_chain()
    client = module.create_app(chain).test_client()
    assert (client.get("/health").status_code, client.get("/health").json) == (200, {"local": "closed", "cloud": "closed"})
    both(machine, BUSY, 1)
    refused = client.post("/ask", json={"question": "hi"})
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "30")
    assert (client.get("/health").status_code, client.get("/health").json) == (503, {"local": "open", "cloud": "open"})
    chain.tiers[0].breaker.open(0)
    assert client.get("/health").status_code == 200  # due for a trial
    chain.tiers[0].breaker.open()
    chain.tiers[1].breaker.open()
    assert "Retry-After" not in client.post("/ask", json={"question": "hi"}).headers  # waiting will not help


def test_flask_tells_a_refused_question_from_an_outage(machine: Machine) -> None:
    """What a safety system refuses is the asker's matter: 422, and nobody else is asked."""
    pytest.importorskip("flask")
    machine.local.script.append(Reply("", finish="content_filter"))
    client = example("flask_view").create_app().test_client()
    refused = client.post("/ask", json={"question": "hi"})
    assert (refused.status_code, refused.json["why"]) == (422, "ContentFiltered")
    assert machine.cloud.requests == []


# ==== Django ==========================================================================================================

SITE = """
import json, django_view, django
from django.test import Client
django.setup()
client = Client()
for path in ("/ask", "/ask-async"):
    for question in ("hi", "fail"):
        seen = client.post(path, {"question": question}, HTTP_HOST="localhost")
        print(json.dumps([seen.status_code, seen.headers.get("Retry-After"), seen.json()]))
    django_view.chain().reset()
"""


def test_django_answers_in_both_kinds_of_view(machine: Machine) -> None:
    """The chain of the settings serves the blocking view and, from a thread, the async one; 503 with Retry-After else."""
    pytest.importorskip("django")

    def answer(body: Any) -> Any:
        return BUSY if body["messages"][-1]["content"] == "fail" else Reply("ok")

    machine.local.script.extend([answer] * 4)
    machine.cloud.script.extend([answer] * 4)
    done = run("-W", "error", "-c", SITE)
    assert done.returncode == 0, done.stderr
    good, bad = [200, None, {"answer": "ok", "by": "local"}], [503, "30", {"error": "no answer at the moment"}]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [good, bad, good, bad]


def test_djangos_check_finds_a_mistake_in_the_settings(machine: Machine) -> None:
    """``manage.py check`` passes with the key in the environment, and without it names place and variable."""
    pytest.importorskip("django")
    assert "no issues" in run(str(EXAMPLES / "django_view.py"), "check").stdout
    wrong = run(str(EXAMPLES / "django_view.py"), "check", OPENAI_API_KEY="")
    assert wrong.returncode == 1
    assert re.search(r"llm\.E001.*settings\.LLM: .*OPENAI_API_KEY", wrong.stderr)


# ==== scripts =========================================================================================================


def test_cron_waits_for_a_provider_and_prints_one_summary(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody answers at first; after a pause out of ``wait`` the same call does. The pause is injected."""
    monkeypatch.setenv("BREAKERS", str(tmp_path / "breakers.db"))
    both(machine, BROKEN, 2)
    machine.local.script.append(Reply("All quiet."))
    (tmp_path / "shop.log").write_text("one\ntwo\n")
    clock = FakeClock()
    assert example("cron_job").main([str(tmp_path / "shop.log")], sleep=clock.sleep) == 0
    assert capsys.readouterr().out == "All quiet.\n"
    assert sum(clock.slept) > 1
    assert machine.local.bodies[0]["messages"][-1]["content"] == "one\ntwo\n"


def test_cron_remembers_between_runs_who_is_down(machine: Machine, tmp_path: Path) -> None:
    """Each run is a process: the first finds out that both are parked, the second asks nobody. Both exit 75."""
    (tmp_path / "shop.log").write_text("one\n")
    unhappy = Raw({"error": {"message": "slow down"}}, 429, headers={"Retry-After": "1800"})
    both(machine, unhappy, 1)
    command = (str(EXAMPLES / "cron_job.py"), "shop.log")
    first, second = (run(*command, cwd=tmp_path, BREAKERS="breakers.db") for _ in range(2))
    assert (first.returncode, second.returncode) == (75, 75), first.stderr + second.stderr
    assert "local: RateLimited" in first.stderr
    assert "local: skipped" in second.stderr
    assert (len(machine.local.requests), len(machine.cloud.requests)) == (1, 1)


def test_csv_goes_on_where_it_stopped(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rows: one answered, then an outage ends the script; started again it asks for the other two only."""
    module = example("csv_rows")
    source, target = tmp_path / "tickets.csv", tmp_path / "answers.csv"
    source.write_text("id,text\n1,charged twice\n2,crash\n3,hello\n")
    arguments = [str(source), str(target), "One word.", "text"]
    machine.local.script.append(Reply("billing"))
    both(machine, BROKEN)
    down = module.make_chain()
    down.wait = 0.0
    assert module.main(arguments, chain=down) == 1
    assert "stopped before row 2" in capsys.readouterr().err
    machine.local.script.clear()
    machine.local.script.extend([Reply("bug"), Reply("", finish="content_filter")])
    assert module.main(arguments) == 0
    assert "3/3" in capsys.readouterr().err
    with open(target, newline="") as file:
        rows = [(row["id"], row["answer"], row["by"]) for row in csv.DictReader(file)]
    assert rows == [("1", "billing", "local"), ("2", "bug", "local"), ("3", "", "ContentFiltered")]
    assert machine.local.bodies[-2]["messages"] == [
        {"role": "system", "content": "One word."}, {"role": "user", "content": "crash"},
    ]  # fmt: skip


def test_what_is_private_and_what_exceeds_the_budget_stays_local(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cloud sees the first public question only: the second would exceed the budget. A private one fails rather."""
    module = example("private_and_budget")
    (tmp_path / "questions.txt").write_text("private: my secret\nfirst\nsecond\n")
    machine.local.script.extend([BROKEN, BROKEN])
    assert module.main("0.000001", str(tmp_path / "questions.txt")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[none] local: ServerError")
    assert lines[1:] == ["[cloud] ok", "[local] ok"]
    assert [body["messages"][-1]["content"] for body in machine.cloud.bodies] == ["first"]


def test_a_tier_without_a_price_counts_as_a_spent_budget(machine: Machine) -> None:
    """An answer that nobody knows the cost of stops the spending instead of hiding it."""
    module = example("private_and_budget")
    budget = module.Budget(100.0)
    chain = module.make_chain(budget)
    chain.tiers[0].prices = None
    assert module.ask(chain, budget, "one").provider == "cloud"
    assert module.ask(chain, budget, "two").provider == "local"


# ==== Celery ==========================================================================================================

WORKER = """
import celery_task
from celery_task import app
from pathlib import Path
here = Path(__file__).parent
folders = {"data_folder_in": str(here / "queue"), "data_folder_out": str(here / "queue"), "control_folder": str(here)}
folders["polling_interval"] = 0.05
app.conf.update(broker_transport_options=folders, worker_hijack_root_logger=False)
celery_task.answer.soft_time_limit = 1
"""
CLIENT = """
import sys
sys.path.insert(0, ".")
import worker_app
from celery_task import answer
for _ in range(2):
    seen = answer.delay("hi").get(timeout=25)
    print(seen["finish_reason"], seen.get("provider"))
"""


def test_celery_retries_when_a_provider_will_be_ready(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The countdown of the retry is the call's ``retry_after``; an answer is JSON."""
    pytest.importorskip("celery")
    from celery.exceptions import Retry

    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    module = example("celery_task")
    assert json.loads(json.dumps(module.answer("hi")))["content"] == "ok"
    both(machine, BUSY, 1)
    module.answer.push_request(called_directly=False, retries=0, id="1", args=("hi",), kwargs={})  # as a worker does
    try:
        with pytest.raises(Retry) as caught:
            module.answer.run("hi")
    finally:
        module.answer.pop_request()
    assert 29 < caught.value.when <= 30
    assert isinstance(caught.value.exc, AllProvidersFailed)


def test_a_soft_time_limit_ends_the_task_and_blames_nobody(machine: Machine, tmp_path: Path) -> None:
    """A real worker: the limit comes out of a silent request through the chain, and the next task is answered."""
    pytest.importorskip("celery")
    over = threading.Event()

    def silent(body: Any) -> Reply:
        over.wait(30)
        return Reply("too late")

    machine.local.script.append(silent)
    (tmp_path / "queue").mkdir()
    (tmp_path / "worker_app.py").write_text(WORKER)
    url = {"CELERY_BROKER_URL": "filesystem://", "CELERY_RESULT_BACKEND": f"file://{tmp_path}"}
    path = os.pathsep.join(map(str, (Path(copilot_router.__file__).parent, EXAMPLES, tmp_path)))
    command = [sys.executable, "-m", "celery", "-A", "worker_app", "worker", "-c", "1", "--without-mingle", "--without-gossip"]
    with open(tmp_path / "log", "w+") as log:
        environment = {**os.environ, **url, "PYTHONPATH": path}
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            done = run("-c", CLIENT, cwd=tmp_path, **url)
        finally:
            over.set()
            os.killpg(worker.pid, signal.SIGKILL)  # the worker and its child: a warm shutdown takes seconds
            worker.wait(20)
        log.seek(0)
        assert done.stdout.splitlines() == ["out of time None", "stop local"], done.stderr + log.read()


# ==== metrics and traces ==============================================================================================


def test_prometheus_counts_what_happened(machine: Machine) -> None:
    """Two calls, one failover, one call that nobody answers, and a parked tier, as they would be scraped."""
    prometheus = pytest.importorskip("prometheus_client")
    module = example("prometheus_metrics")
    registry = prometheus.CollectorRegistry()
    chain = module.make_chain(module.Metrics(registry))
    chain.chat("hi")
    machine.local.script.append(BUSY)
    chain.chat("hi")
    machine.cloud.script.append(BUSY)
    with pytest.raises(AllProvidersFailed):
        chain.chat("hi")

    def value(name: str, **labels: str) -> float | None:
        found: float | None = registry.get_sample_value(name, labels)
        return found

    assert (value("llm_calls_total", outcome="ok"), value("llm_calls_total", outcome="AllProvidersFailed")) == (2, 1)
    assert value("llm_requests_total", tier="local", model="") == 2
    assert value("llm_requests_total", tier="cloud", model="gpt-6-luna") == 2
    assert value("llm_failovers_total", tier="local", to="cloud") == 1
    assert value("llm_tokens_total", tier="cloud", kind="prompt") == Chat.usage["prompt_tokens"]
    assert value("llm_cost_usd_total") == pytest.approx((20 * 0.1 + 15 * 0.5) / 1e6)
    assert value("llm_call_seconds_count", outcome="ok") == 2
    assert (value("llm_breaker_open", tier="local"), value("llm_breaker_open", tier="cloud")) == (1, 1)
    chain.reset()
    assert value("llm_breaker_open", tier="local") == 0


def test_opentelemetry_gets_a_span_for_every_request(machine: Machine) -> None:
    """A failed request and the answered one, children of the caller's span, with the conventions' names and no text."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    module = example("otel_spans")
    chain = module.make_chain(module.Spans(tracer, {"cloud": "openai"}))
    machine.local.script.append(BUSY)
    with tracer.start_as_current_span("view"):
        chain.chat("a secret question")
    machine.cloud.script.append(BUSY)
    with pytest.raises(AllProvidersFailed):
        chain.chat("a secret question")
    failed, answered, view, last = exporter.get_finished_spans()
    assert failed.name == "chat"
    assert dict(failed.attributes) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "local", "error.type": "_OTHER",
    }  # fmt: skip
    assert [event.name for event in failed.events] == ["breaker"]
    assert not failed.status.is_ok
    assert (answered.name, answered.kind.name) == ("chat gpt-6-luna", "CLIENT")
    assert dict(answered.attributes) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-6-luna",
        "gen_ai.response.model": "gpt-6-luna", "gen_ai.usage.input_tokens": 20, "gen_ai.usage.output_tokens": 15,
    }  # fmt: skip
    assert answered.parent.span_id == failed.parent.span_id == view.context.span_id
    assert last.attributes["error.type"] == "AllProvidersFailed"
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())


# ==== a provider of one's own, tests of one's own =====================================================================


def test_the_sdk_answers_as_a_tier_with_tools(machine: Machine) -> None:
    """Text, usage and tool calls come through the vendor's own SDK; a second turn takes the tool's result."""
    pytest.importorskip("openai")
    chain = example("vendor_sdk").make_chain()
    machine.cloud.script.extend([Reply(calls=[("weather", {"city": "Bern"})]), Reply("Sunny.")])
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather in Bern?"}]
    first = chain.chat(messages, tools)
    assert (first.tool_calls[0].arguments, first.usage.total_tokens) == ({"city": "Bern"}, 35)
    messages += [first.message, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}]
    assert chain.chat(messages, tools).text == "Sunny."


@pytest.mark.parametrize(
    ("answer", "kind", "wait"),
    [
        (BUSY, RateLimited, 30.0),
        (Raw({"error": {"message": "my prompt"}}, 401), AuthenticationError, None),
        (Raw({"error": {"message": "my prompt"}}, 404), ModelNotFound, None),
        (BROKEN, copilot_router.ServerError, None),
        (Raw({"error": {"message": "my prompt"}}, 422), copilot_router.BadRequest, None),
    ],
)
def test_the_sdks_errors_become_ours(
    machine: Machine, answer: Raw, kind: type[copilot_router.ProviderError], wait: float | None
) -> None:
    """Each class with its status and Retry-After, once and without the SDK's own retries, and none of the server's text."""
    openai = pytest.importorskip("openai")
    module = example("vendor_sdk")
    machine.cloud.script.append(answer)
    with openai.OpenAI() as client, pytest.raises(kind) as caught:
        module.SDKProvider(client).chat([{"role": "user", "content": "hi"}], model="gpt-6-luna", timeout=5)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.retry_after) == (answer.status, wait)
    assert "prompt" not in str(caught.value)
    assert len(machine.cloud.requests) == 1


def test_the_sdk_that_cannot_connect_fails_over(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is ProviderUnavailable, and the emergency tier answers."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    response = example("vendor_sdk").make_chain().chat("hi")
    assert response.provider == "local"
    assert str(response.attempts[0].error).startswith("ProviderUnavailable")


def test_the_recipe_for_tests_passes() -> None:
    """Your own tests: they pass under pytest, as they stand."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_your_app.py")
    done = run(*command, cwd=EXAMPLES)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def test_every_recipe_is_tested_and_linked() -> None:
    """No file in examples/ without a test here or of its own, and none that the README does not name."""
    tested = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tested, path
        assert f"examples/{path.name}" in readme, path
