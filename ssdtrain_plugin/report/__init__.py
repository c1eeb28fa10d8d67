"""``ssdtrain report``: what a run did, as one page, as pictures, and as a trace for Perfetto."""

from ssdtrain_plugin.report.chrome import write_chrome_trace
from ssdtrain_plugin.report.page import write_page
from ssdtrain_plugin.report.reading import Run, read_run

__all__ = ["Run", "read_run", "write_chrome_trace", "write_page"]
