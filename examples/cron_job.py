"""A cron job that sums up a log file. It may wait ten minutes for a provider.

    17 * * * *  python cron_job.py /var/log/shop.log | mail -s "The last hour" you@example.com

The breakers live in a SQLite file, so each run knows what the runs before it found out: a
provider that has asked for an hour of rest is not asked until then. The `recovery_timeout` (15 s
here) must be shorter than `wait`, or no wait would be long enough for a provider that is down.
Exit status: 0 if a summary was printed, 75 (EX_TEMPFAIL) if nobody answered.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from copilot_router import (
    AllProvidersFailed,
    FailoverChain,
    LMStudioProvider,
    OpenAIProvider,
    ProviderTier,
    SQLiteStore,
)

STATE = os.environ.get("BREAKERS", "breakers.db")
TAIL = 50_000  #: characters: the end of a log is what matters


def make_chain(**settings: Any) -> FailoverChain:
    return FailoverChain(
        [
            ProviderTier("local", LMStudioProvider()),
            ProviderTier("cloud", OpenAIProvider(), ["gpt-6-luna"]),
        ],
        store=SQLiteStore(STATE),
        wait=600,  # sleep at most so long, in all, until a tier is ready again
        **settings,
    )


def main(arguments: list[str], **settings: Any) -> int:
    log = Path(arguments[0]).read_text(encoding="utf-8", errors="replace")[-TAIL:]
    try:
        with make_chain(**settings) as chain:
            response = chain.chat(
                log, system="Sum up this log in five lines. Name what an operator should look at."
            )
    except AllProvidersFailed as error:
        print(error.explain(), file=sys.stderr)
        return 75
    print(response.text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
