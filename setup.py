"""Everything said here is read from settings.ini; edit that file, not this one."""

import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_settings() -> configparser.SectionProxy:
    "The [DEFAULT] section of settings.ini."
    parser = configparser.ConfigParser(delimiters=["="])
    with open(ROOT / "settings.ini", encoding="utf-8") as f: parser.read_file(f)
    return parser["DEFAULT"]


cfg = read_settings()
package = cfg["lib_path"]
readme = ROOT / "README.md"


class BuildWithNotebooks(build_py):
    "Ship the reproduction notebooks inside the package; the tree holds them once, in nbs/repro."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return  # an editable install reads nbs/repro itself
        target = Path(self.build_lib) / package / "notebooks"
        shutil.rmtree(target, ignore_errors=True)  # so that no notebook since renamed is shipped
        target.mkdir(parents=True)
        for notebook in self.notebooks(): shutil.copyfile(notebook, target / notebook.name)

    def notebooks(self) -> list[Path]:
        return sorted((ROOT / cfg["nbs_path"] / "repro").glob("repro_*.ipynb"))

    def get_outputs(self, include_bytecode=1):
        target = Path(self.build_lib) / package / "notebooks"
        return super().get_outputs(include_bytecode) + [str(target / n.name) for n in self.notebooks()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    license=cfg["license"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    classifiers=cfg["classifiers"].strip().splitlines(),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={e: cfg[f"{e}_requirements"].split() for e in ["dev", *cfg["extras"].split()]},
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["assets/**"]},
    include_package_data=False,
    cmdclass={"build_py": BuildWithNotebooks},
    # The nbdev entry point lets documentation of other nbdev projects link to our symbols.
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    zip_safe=False,
)
