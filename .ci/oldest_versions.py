"""Print, as constraints for pip, the oldest version that each requirement of the installed lightning-lora allows."""

from importlib.metadata import requires

from packaging.requirements import Requirement

PROJECT = "lightning-lora"

requirements = [Requirement(line) for line in requires(PROJECT) or []]
oldest = {
    requirement.name: specifier.version
    for requirement in requirements
    for specifier in requirement.specifier
    if specifier.operator == ">="
}
missing = {requirement.name for requirement in requirements} - {PROJECT} - oldest.keys()
assert not missing, f"pyproject.toml names no oldest version of {missing}"
oldest["pytorch-lightning"] = oldest["lightning"]  # the same code by its other name, which any version may come with
for name, version in oldest.items():
    print(f"{name}=={version}")
