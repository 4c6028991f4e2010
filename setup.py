"""Build of the one extension, `quantization._kernels`: every C file below csrc, no flags per file.

Instruction sets are opened by pragmas inside their own files, so one plain build serves every CPU.
`QUANTIZATION_CFLAGS` adds compiler flags (warnings as errors, sanitizers) in development.
"""

import os
import shlex
import sys
import sysconfig
from pathlib import Path

import numpy
from setuptools import Extension, setup

# Free-threaded CPython has no limited API: there the extension is built for one version.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
SOURCES = sorted(path.as_posix() for path in Path("csrc").rglob("*.c"))
HEADERS = sorted(
    path.as_posix() for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inc", ".def"}
)

MACROS = [
    ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION"),
    ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"),
]
if LIMITED_API:
    MACROS.append(("Py_LIMITED_API", "0x030B0000"))

FLAGS, LINK_FLAGS = [], []
if sys.platform != "win32":
    FLAGS = ["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    FLAGS += ["-Werror=implicit-function-declaration"]
    LINK_FLAGS = ["-pthread", "-lm"]
else:
    FLAGS = ["/std:c11", "/O2", "/fp:precise"]
extra = shlex.split(os.environ.get("QUANTIZATION_CFLAGS", ""))

setup(
    ext_modules=[
        Extension(
            "quantization._kernels",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=["csrc", numpy.get_include()],
            define_macros=MACROS,
            extra_compile_args=FLAGS + extra,
            extra_link_args=LINK_FLAGS + [flag for flag in extra if flag.startswith("-fsanitize")],
            py_limited_api=LIMITED_API,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
