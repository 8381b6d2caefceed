from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import pkgutil, sys
bare = {name.partition(".")[0] for name in sys.modules}
import pydantic
import sft_api
known = bare | set(sys.stdlib_module_names) | {"sft_api", "pydantic", "pydantic_core", "annotated_types"}
known |= {"typing_extensions", "typing_inspection"}
for module in pkgutil.iter_modules(sft_api.__path__):
    __import__(f"sft_api.{module.name}")
found = {name.partition(".")[0] for name in sys.modules} - known
print(sorted(name for name in found if not name.startswith("_sysconfigdata")))
"""


def test_the_api_imports_pydantic_and_the_standard_library_alone() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
