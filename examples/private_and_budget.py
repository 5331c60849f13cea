"""Two limits on where a question may go: private ones stay here, and the cloud has a budget.

    python examples/private_and_budget.py 0.50 questions.txt

The first argument is the budget in USD. Lines that begin with "private:" are asked of the local
tier only: ``tiers=["local"]`` is strict, so no other tier is asked, whatever fails.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from copilot_router import (
    AllProvidersFailed,
    Event,
    FailoverChain,
    LLMResponse,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
)


class Budget:
    """Adds up what answered calls cost: pass it as ``on_event``. Thread-safe.

    Calls that are under way can still exceed the budget. A cost of None means that the price is not
    known, so the budget counts as spent. Not counted: calls that nobody answered (``.attempts`` of
    the error has their tokens) and streams that their readers left.
    """

    def __init__(self, usd: float) -> None:
        self.left = usd
        self.unpriced = False
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if event.kind == "done" and event.data["outcome"] == "ok":
            with self._lock:
                self.unpriced = self.unpriced or event.data["cost"] is None
                self.left -= event.data["cost"] or 0.0

    @property
    def spent(self) -> bool:
        return self.unpriced or self.left <= 0


def make_chain(on_event: Callable[[Event], None]) -> FailoverChain:
    tiers = [
        # Prices are in USD per million tokens.
        ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"], prices=(0.1, 0.5)),
        ProviderTier("local", LMStudioProvider(), prices=(0, 0)),
    ]
    return FailoverChain(tiers, on_event=on_event, timeout=60)


def ask(chain: FailoverChain, budget: Budget, question: str) -> LLMResponse:
    stay = question.startswith("private:") or budget.spent
    return chain.chat(question.removeprefix("private:").strip(), tiers=["local"] if stay else None)


def main(usd: str, path: str) -> int:
    budget = Budget(float(usd))
    with make_chain(budget) as chain:
        for question in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                response = ask(chain, budget, question)
                print(f"[{response.provider}] {response.text}")
            except AllProvidersFailed as error:
                print(f"[none] {error.explain()}")
    print(f"${budget.left:.6f} left", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
