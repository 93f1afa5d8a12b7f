"What mypy sees of `mlserve.patch`: each patched function stands in the body of its class."
from mypy.nodes import ClassDef, Decorator, MypyFile, NameExpr
from mypy.plugin import Plugin
from mypy.types import UnboundType


class PatchedMethods(Plugin):
    def get_additional_deps(self, file: MypyFile) -> list[tuple[int, str, int]]:
        "Asked once for each parsed module, before it is analysed"
        classes = {node.name: node for node in file.defs if isinstance(node, ClassDef)}
        for node in [n for n in file.defs if isinstance(n, Decorator)]:
            if [d.name for d in node.decorators if isinstance(d, NameExpr)] != ["patch"]:
                continue
            annotation = node.func.arguments[0].type_annotation
            if isinstance(annotation, UnboundType) and annotation.name in classes:
                node.func.is_decorated = False
                classes[annotation.name].defs.body.append(node.func)
                file.defs.remove(node)
        return []


def plugin(version: str) -> type[Plugin]:
    return PatchedMethods
