"""Talking an engine into other weights, and out of it what they say: effects that end in what became of them."""

from __future__ import annotations

import logging
import time

from appliance.errors import ApplianceError, reason
from appliance.store.processes import ProcessRow
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.references import first_difference, repeat, speaker
from appliance.supervisor.served_models import ServedModels

log = logging.getLogger(__name__)


async def load_weights(kind: EngineKind, models: ServedModels, row: ProcessRow) -> str:
    """Load the weights of its owner into the process, and see that they are those; why not, where it did not work."""
    release, begun = row.owner, time.monotonic()
    try:
        await kind.reload(row.address, models.directory(release), release, models.template(release).today)
        if said := await first_difference(kind, row.address, release, models.answers(release)):
            return said
    except (ApplianceError, ConnectionError) as error:
        log.warning("the weights of %s were not loaded: %s", release, error)
        return str(error)
    log.info("the weights of %s were loaded in %.1f s", release, time.monotonic() - begun)
    return ""


async def replay(kind: EngineKind, models: ServedModels, row: ProcessRow) -> tuple[bool, str]:
    """Whether the process may go on with a release from elsewhere, by its reference answers, and what is said of it.

    Raises ConnectionError where the engine does not answer.
    """
    release = row.owner
    try:
        reference = models.manifest(release).get("reference", {})
        made_on, here = speaker(reference), models.speaker_here(release)
        if made_on == here and not reference.get("answers"):
            return False, "its archive names no reference answers to be repeated"
        if made_on != here:
            what = f"are those of another engine ({made_on})" if made_on else "are not in its archive"
            return True, f"its reference answers {what}, so none was repeated here"
        count, wrong = await repeat(kind, row.address, release, reference["answers"])
    except ConnectionError:
        raise
    except Exception as error:
        log.exception("the reference answers of %s cannot be asked for", release)
        return False, f"its reference answers could not be asked for here: {reason(error)}"
    log.info("%s: %s", release, count)
    return not wrong, wrong or count
