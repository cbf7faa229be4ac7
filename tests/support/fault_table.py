"""Prints the table of bad data and damaged files in examples/docs/faults.md.

    python -m tests.support.fault_table                     tries each fault as often as `make test`
    GRAM_FAULTS=long python -m tests.support.fault_table    as often as `make test-long`
"""

import tempfile
from pathlib import Path

from tests import test_config_faults, test_data_faults, test_security
from tests.support.data_faults import Work, table

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        faults = [*test_data_faults.FAULTS, *test_config_faults.FAULTS, *test_security.FAULTS]
        print(*table(faults, Work(Path(folder))), sep="\n")
