"""A hundred runs, kept honest."""

from axmoe_lite.runs.evidence import EVIDENCE, SCALES, commit, device_name, evidence, read, record
from axmoe_lite.runs.timing import interleaved, turns
