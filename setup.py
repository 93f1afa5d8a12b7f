"""Everything about the package is declared once, in `settings.ini`."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
wings = {name: cfg[f"{name}_requirements"].split() for name in ("serving", "uploads", "torch", "onnx", "tflite", "s3", "gs", "az", "hf", "registry", "tables", "keras", "otel", "grpc", "release", "dev")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["mlserve", "mlserve.*"]) + ["mlserve.pipelines", "mlserve.scaffolds"],
    package_dir={"mlserve.pipelines": "nbs/pipelines", "mlserve.scaffolds": "nbs/scaffolds"},  # notebooks that travel in the wheel
    package_data={"mlserve": ["py.typed", "serving/docs/page.html"], "mlserve.pipelines": ["*.ipynb"], "mlserve.scaffolds": ["*.ipynb", "*.toml", "*.yaml", "*.md", "requirements.txt", "gitignore"]},
    install_requires=cfg["requirements"].split(),
    extras_require={
        "serving": wings["serving"],
        "uploads": wings["uploads"],
        "torch": wings["torch"],
        "onnx": wings["onnx"],
        "tflite": wings["tflite"],
        "s3": wings["s3"],
        "gs": wings["gs"],
        "az": wings["az"],
        "hf": wings["hf"],
        "registry": wings["registry"],
        "tables": wings["tables"],
        "keras": wings["keras"],
        "otel": wings["otel"],
        "grpc": wings["grpc"],
        "release": wings["release"],
        "dev": wings["serving"] + wings["uploads"] + wings["torch"] + wings["onnx"] + wings["tflite"] + wings["s3"] + wings["gs"] + wings["az"] + wings["hf"] + wings["tables"] + wings["otel"] + wings["grpc"] + wings["release"] + wings["dev"],
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
