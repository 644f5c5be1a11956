"""Settings for the tests of the data room: no time limit for one example, since the machine may be shared."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("streamtrain", deadline=None)
settings.load_profile("streamtrain")
