"""Small `.tflite` files without a converter, written with the schema that the runtime brings: two dense layers, of floats or of integers."""
import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

FULLY_CONNECTED, CUSTOM = 9, 32
STEPS = {"x": (0.05, 3), "hidden": (0.05, -128), "scores": (0.1, -5)}  # scale and zero point of the integers


def tensor(name, shape, kind, buffer, free, scale=None, zero=0):
    t = schema.TensorT()
    t.name, t.shape, t.type, t.buffer = name, list(shape), kind, buffer
    if free:
        t.shapeSignature = [-1, *shape[1:]]
    if scale:
        t.quantization = schema.QuantizationParametersT()
        t.quantization.scale, t.quantization.zeroPoint = [scale], [zero]
    return t


def dense(inputs, output, relu):
    step, options = schema.OperatorT(), schema.FullyConnectedOptionsT()
    step.opcodeIndex, step.inputs, step.outputs = 0, inputs, [output]
    options.fusedActivationFunction = int(relu)
    step.builtinOptionsType, step.builtinOptions = schema.BuiltinOptions.FullyConnectedOptions, options
    return step


def lite_bytes(int8=False, free=True, custom=None, rows=1, gives=("scores",)):
    "A file: `x` of four numbers → `scores` of three"
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), 8, (3, 8), 3)]
    scales = [0.02, STEPS["x"][0] * 0.02, 0.02, STEPS["hidden"][0] * 0.02] if int8 else [None] * 4
    if int8:
        kinds = (np.int8, np.int32) * 2
        weights = [np.clip(np.round(w / s), -127 if k == np.int8 else -(2**31), 127 if k == np.int8 else 2**31 - 1).astype(k) for w, s, k in zip(weights, scales, kinds)]
    types = {np.dtype("f4"): schema.TensorType.FLOAT32, np.dtype("i1"): schema.TensorType.INT8, np.dtype("i4"): schema.TensorType.INT32}
    kind = schema.TensorType.INT8 if int8 else schema.TensorType.FLOAT32
    graph, model, code = schema.SubGraphT(), schema.ModelT(), schema.OperatorCodeT()
    flows = [tensor(name, (rows, n), kind, 0, free, *(STEPS[name] if int8 else ())) for name, n in (("x", 4), ("hidden", 8), ("scores", 3))]
    constants = [tensor(f"w{i}", w.shape, types[w.dtype], i + 1, False, s) for i, (w, s) in enumerate(zip(weights, scales))]
    flows[1].name, flows[2].name = (gives + ("hidden",))[1], gives[0]
    graph.tensors, graph.inputs, graph.outputs = flows + constants, [0], [2, 1][:len(gives)]
    graph.operators = [dense([0, 3, 4], 1, True), dense([1, 5, 6], 2, False)]
    code.builtinCode = code.deprecatedBuiltinCode = CUSTOM if custom else FULLY_CONNECTED
    code.customCode, code.version = custom, 4 if int8 else 1
    model.buffers = [schema.BufferT() for _ in range(5)]
    for buffer, w in zip(model.buffers[1:], weights):
        buffer.data = np.frombuffer(w.tobytes(), np.uint8)
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
