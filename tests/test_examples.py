"""Every recipe runs, with its own chain, the frameworks themselves and servers on this machine."""

from __future__ import annotations

import csv
import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import recipes
from support.fakes import VirtualClock, error_of
from support.pages import section
from support.recipes import (BROKEN, BUSY, DJANGO, EXAMPLES, STREAMS, Endless, Machine, example,
    pieces, refusal, run, says, served)

import copilot_router as cr

FILTERED = says("", finish="content_filter")
REFUSED = {"error": "this question cannot be answered", "why": "ContentFiltered"}
NOBODY = {"error": "no answer at the moment"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with recipes.two_servers(monkeypatch) as found:
        yield found


# -- views
@pytest.mark.parametrize(("local", "cloud", "status", "wait", "body"),
    [([], [], 200, None, {"answer": "ok", "by": "local"}),
        ([BROKEN] * 2, [says("from afar")], 200, None, {"answer": "from afar", "by": "cloud"}),
        ([BUSY], [BUSY], 503, "30", NOBODY), ([FILTERED], [], 422, None, REFUSED)])
def test_flask_view_answers_or_says_why_not(machine: Machine, local: Any, cloud: Any, status: int,
        wait: str | None, body: Any) -> None:
    machine.local.script.extend(local)
    machine.cloud.script.extend(cloud)
    client = example("flask_view", "flask").create_app().test_client()
    seen = client.post("/ask", json={"question": "hi"})
    assert (seen.status_code, seen.headers.get("Retry-After"), seen.json) == (status, wait, body)
    assert client.get("/health").status_code == (503 if status == 503 else 200)


def test_django_answers_in_both_kinds_of_view_and_checks_the_settings(machine: Machine) -> None:
    pytest.importorskip("django")
    machine.local.script.extend([says("ok"), BUSY] * 2)
    machine.cloud.script.extend([BUSY] * 2)
    done = run("-W", "error", "-c", DJANGO)
    expected = [[200, None, {"answer": "ok", "by": "local"}], [503, "30", NOBODY]] * 2
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected, done.stderr
    check = (str(EXAMPLES / "django_view.py"), "check")
    assert "no issues" in run(*check).stdout
    assert re.search(r"llm\.E001.*OPENAI_API_KEY", run(*check, OPENAI_API_KEY="").stderr)


# -- streams, over HTTP
TEXTS = ("one ", "two\n", "three")

@pytest.mark.parametrize("name", STREAMS)
def test_pieces_arrive_one_by_one_from_the_second_tier(machine: Machine, name: str) -> None:
    gate = threading.Semaphore(1)
    machine.local.script.extend([BROKEN] * 2)
    machine.cloud.script.append(says(*TEXTS, gate=gate))
    with served(name) as response:
        seen = pieces(response)
        for text in TEXTS:
            assert next(seen) == text
            gate.release()
        assert response.status == 200
        assert [text.split()[0] for text in seen] == (["end"] if "sse" in name else [])


@pytest.mark.parametrize("name", [*STREAMS, "flask_stream politely"])
def test_answer_that_breaks_off_never_looks_complete(machine: Machine, name: str) -> None:
    """The plain recipes cut the connection, the others say so in words."""
    machine.local.script.append(says(TEXTS[0], broken=True))
    name, _, politely = name.partition(" ")
    with served(name, "/ask-politely" if politely else "") as response:
        if "sse" in name or politely:
            assert re.search(r"bro(ken|ke off)", list(pieces(response))[-1])
        else:
            error_of(http.client.IncompleteRead, response.read)


@pytest.mark.parametrize("name", STREAMS)
def test_visitor_who_leaves_frees_the_provider(machine: Machine, name: str) -> None:
    endless = Endless()
    machine.local.script.append(endless)
    with served(name) as response:
        assert next(pieces(response)).startswith("more ")
        response.close()
    assert endless.gone.acquire(timeout=10)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_that_cannot_begin_is_a_503(machine: Machine, name: str) -> None:
    machine.both(BUSY)
    with served(name) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "30")
        assert json.loads(response.read()) == NOBODY


def test_heartbeat_is_sent_while_the_model_is_silent(machine: Machine,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTBEAT", "0.02")
    gate = threading.Semaphore(1)
    machine.local.script.append(says(*TEXTS, gate=gate))
    with served("sse_heartbeat") as response:
        while response.readline() != b": still there\n":
            pass
        gate.release(9)
        assert response.read().endswith(b'event: end\ndata: {"by": "local", "tokens": 35}\n\n')


def test_thoughts_have_a_pane_that_is_cleared_when_another_tier_is_asked(machine: Machine) -> None:
    machine.local.script.append(says(reasoning=("hm, ",), broken=True))
    machine.cloud.script.append(says(*TEXTS, reasoning=("let me ", "see")))
    with served("sse_thoughts") as response:
        seen = list(pieces(response))
    thoughts = ['thought "hm, "', 'restart ""', 'thought "let me "', 'thought "see"']
    assert seen == [*thoughts, *TEXTS, 'end {"by": "cloud"}']


# -- scripts and tasks
def test_cron_job_waits_for_a_provider_and_remembers_who_is_down(machine: Machine, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The first run gets its answer after a pause. The third asks nobody."""
    monkeypatch.setenv("BREAKERS", str(tmp_path / "breakers.db"))
    (log := tmp_path / "shop.log").write_text("one\n")
    machine.both(BROKEN, 2)
    machine.local.script.append(says("All quiet."))
    clock = VirtualClock()
    assert example("cron_job").main([str(log)], sleep=clock.sleep) == 0 and sum(clock.slept) > 1
    machine.both(refusal(429, Retry_After="1800"))
    assert [example("cron_job").main([str(log)]) for _ in range(2)] == [75, 75]
    printed = capsys.readouterr()
    first, second = printed.err.splitlines()
    assert printed.out == "All quiet.\n"
    assert ("local: RateLimited" in first, "local: skipped" in second) == (True, True)


def test_csv_rows_go_on_where_they_stopped(machine: Machine, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    """An outage ends the script after one row. Started again, it asks for the others only."""
    module = example("csv_rows")
    source, target = tmp_path / "tickets.csv", tmp_path / "answers.csv"
    source.write_text("id,text\n1,charged twice\n2,crash\n3,hello\n")
    arguments = [str(source), str(target), "One word.", "text"]
    machine.local.script.append(says("billing"))
    machine.both(BROKEN, 2)
    down = module.make_chain()
    down.wait = 0.0
    assert module.main(arguments, chain=down) == 1
    assert "stopped before row 2" in capsys.readouterr().err
    machine.local.script.clear()
    machine.local.script.extend([says("bug"), FILTERED])
    assert module.main(arguments) == 0
    with open(target, newline="") as file:
        rows = [(row["id"], row["answer"], row["by"]) for row in csv.DictReader(file)]
    assert rows == [("1", "billing", "local"), ("2", "bug", "local"), ("3", "", "ContentFiltered")]


def test_private_questions_and_those_over_the_budget_stay_local(machine: Machine, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "questions.txt").write_text("private: my secret\nfirst\nsecond\n")
    machine.local.script.extend([BROKEN] * 2)
    assert example("private_and_budget").main("0.000001", str(tmp_path / "questions.txt")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == ["[none", "[cloud", "[local"]
    assert [body["messages"][-1]["content"] for body in machine.cloud.bodies] == ["first"]


def test_celery_task_is_tried_again_when_a_provider_is_ready(machine: Machine) -> None:
    module = example("celery_task", "celery")
    from celery.exceptions import Retry
    assert json.loads(json.dumps(module.answer("hi")))["content"] == "ok"
    machine.both(BUSY)
    module.answer.push_request(called_directly=False, retries=0, id="1", args=("hi",), kwargs={})
    with pytest.raises(Retry) as caught:
        module.answer.run("hi")
    module.answer.pop_request()
    assert 29 < caught.value.when <= 30


def test_soft_time_limit_ends_the_task_and_blames_no_provider(machine: Machine) -> None:
    module = example("celery_task", "celery")
    over = cr.ScriptedProvider([module.SoftTimeLimitExceeded()])
    chain = cr.FailoverChain([cr.ProviderTier("a", over)])
    module.chain = lambda: chain
    assert module.answer("hi")["finish_reason"] == "out of time"
    assert chain.health()[0].breaker.failures == 0


# -- metrics, traces, an SDK
def test_prometheus_counts_what_happened(machine: Machine) -> None:
    module = example("prometheus_metrics", "prometheus_client")
    registry = module.CollectorRegistry()
    chain = module.make_chain(module.Metrics(registry))
    machine.local.script.extend([says("ok"), BUSY])
    machine.cloud.script.extend([says("ok"), BUSY])
    chain.chat("hi")
    chain.chat("hi")
    error_of(cr.AllProvidersFailed, chain.chat, "hi")
    value = registry.get_sample_value
    assert value("llm_calls_total", {"outcome": "ok"}) == 2
    assert value("llm_calls_total", {"outcome": "AllProvidersFailed"}) == 1
    assert value("llm_requests_total", {"tier": "cloud", "model": "gpt-6-luna"}) == 2
    assert value("llm_failovers_total", {"tier": "local", "to": "cloud"}) == 1
    assert value("llm_tokens_total", {"tier": "cloud", "kind": "prompt"}) == 20
    assert value("llm_cost_usd_total") == pytest.approx((20 * 0.1 + 15 * 0.5) / 1e6)
    assert value("llm_breaker_open", {"tier": "local"}) == 1
    chain.reset()
    assert value("llm_breaker_open", {"tier": "local"}) == 0


def test_opentelemetry_gets_a_span_for_every_request(machine: Machine) -> None:
    module = example("otel_spans", "opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    chain = module.make_chain(module.Spans(tracer, {"cloud": "openai"}))
    machine.local.script.append(BUSY)
    with tracer.start_as_current_span("view"):
        chain.chat("a secret question")
    failed, answered, view = exporter.get_finished_spans()
    assert (failed.attributes["gen_ai.provider.name"], failed.status.is_ok) == ("local", False)
    facts = {"operation.name": "chat", "provider.name": "openai"}
    facts |= {"request.model": "gpt-6-luna", "response.model": "gpt-6-luna"}
    facts |= {"usage.input_tokens": 20, "usage.output_tokens": 15}
    assert dict(answered.attributes) == {f"gen_ai.{name}": fact for name, fact in facts.items()}
    assert answered.parent.span_id == failed.parent.span_id == view.context.span_id
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_sdk_answers_as_a_tier_with_tools(machine: Machine) -> None:
    chain = example("vendor_sdk", "openai").make_chain()
    machine.cloud.script.append(says(calls=[("weather", {"city": "Bern"})]))
    tools = [{"type": "function", "function": {"name": "weather"}}]
    first = chain.chat("Weather in Bern?", tools)
    assert (first.tool_calls[0].arguments, first.usage.total_tokens) == ({"city": "Bern"}, 35)
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}
    question = {"role": "user", "content": "Weather in Bern?"}
    assert chain.chat([question, first.message, result], tools).text == "ok"


@pytest.mark.parametrize(("status", "kind"), [(429, cr.RateLimited), (401, cr.AuthenticationError),
    (404, cr.ModelNotFound), (500, cr.ServerError), (422, cr.BadRequest)])
def test_errors_of_the_sdk_become_ours(machine: Machine, status: int,
        kind: type[cr.ProviderError]) -> None:
    module = example("vendor_sdk", "openai")
    machine.cloud.script.append(refusal(status, "my prompt", Retry_After="30"))
    with module.openai.OpenAI() as client, pytest.raises(kind) as caught:
        module.SDKProvider(client).chat([{"role": "user", "content": "hi"}], model="m", timeout=5)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.retry_after) == (status, 30.0)
    assert ("prompt" in str(caught.value), len(machine.cloud.bodies)) == (False, 1)


def test_the_demonstration_succeeds_without_colour_in_a_pipe_and_its_timeline_is_drawn(
        machine: Machine, tmp_path: Path) -> None:
    done = run(str(EXAMPLES / "demo.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout.count(" ok  "), "\033" in done.stdout) == (9, False)
    assert example("demo", "matplotlib").main(["--svg", str(tmp_path / "timeline.svg")]) == 0
    drawn = (tmp_path / "timeline.svg").read_text(encoding="utf-8")
    assert all(text in drawn for text in ("chain.chat()", "breaker opens: ServerError", "strong"))


def test_recipe_for_tests_passes_under_pytest() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_your_app.py"))
    assert "5 passed" in done.stdout, done.stdout


def test_every_recipe_is_tested_and_has_a_row_in_the_guide() -> None:
    tested = "".join(Path(name).read_text("utf-8") for name in (__file__, recipes.__file__))
    guide = section("docs/operations.md", "Recipes")
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tested, path
        assert f"../examples/{path.name}" in guide, path
