"""Structured logs: one JSON object a line on standard error, or, at a terminal, lines for a person.

Neither keys nor inputs are ever handed to it.
"""

import logging
import sys

import msgspec
import structlog


def configure_logs(level: str) -> None:
    """Send structlog's and the standard library's events to standard error. Raises ValueError for no level."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"ACP_LOG_LEVEL must be debug, info, warning or error, not {level!r}")
    stamp = structlog.processors.TimeStamper(fmt="iso")
    renderer: structlog.typing.Processor
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    else:
        renderer = structlog.processors.JSONRenderer(serializer=_json)
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level, stamp]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)


def _json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()
