"""What other tests import from here stands in ``support.stores``."""

from support.stores import (  # noqa: F401
    REDIS,
    RedisServer,
    Wrapped,
    make_store,
    redis_server,
    redis_url,
)
