"""A script over a CSV file, one question for each row. It can be stopped and started again.

    python examples/csv_rows.py tickets.csv answers.csv "In one word, what is this about?" text

Progress goes to standard error. Rows that the output already has are not asked again. Exit
status: 0 if all rows are done, 1 if nobody answered: start it again later.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

from copilot_router import (
    AllProvidersFailed,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderError,
    ProviderTier,
)


def make_chain() -> FailoverChain:
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),
            # Prices are in USD per million tokens.
            ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"], prices=(0.1, 0.5)),
        ],
        timeout=60,
        wait=300,
    )


def main(arguments: list[str], chain: FailoverChain | None = None) -> int:
    source, target, question, column = arguments
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    done = 0
    if Path(target).exists():
        with open(target, newline="", encoding="utf-8") as file:
            done = sum(1 for _ in csv.DictReader(file))
    cost, start = 0.0, time.monotonic()
    with open(target, "a", newline="", encoding="utf-8") as file, chain or make_chain() as chain:
        writer = csv.DictWriter(file, [*rows[0], "answer", "by"]) if rows else None
        if writer and not done:
            writer.writeheader()
        for at, row in enumerate(rows[done:], done + 1):
            try:
                response = chain.chat(row[column], system=question)
                answer, by = response.text, response.provider
                cost += response.cost or 0.0
            except AllProvidersFailed as error:
                print(f"\nstopped before row {at}: {error.explain()}", file=sys.stderr)
                return 1
            except ProviderError as error:  # this row alone: too long, refused by a safety system
                answer, by = "", type(error).__name__
            assert writer is not None
            writer.writerow({**row, "answer": answer, "by": by})
            file.flush()  # keeps the answers that are paid for
            pace = (time.monotonic() - start) / (at - done)
            print(
                f"\r{at}/{len(rows)} {pace:.1f} s/row ${cost:.4f} {by}\033[K",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
