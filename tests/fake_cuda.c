/* A stand-in for libcuda.so.1: memory is the host's, and the one kernel that is known is computed here.

FAKE_CUDA holds words such as "count=2 driver=13000 free=100 cuLaunchKernel=719": numbers of the machine, and what a function answers instead of
doing its work. The file that FAKE_CUDA_FILE names is read at each call and holds more of them, so that a GPU can be lost while it is used. */
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int in(const char *text, const char *word, long *value) {
    size_t n = strlen(word);
    for (const char *p = text; p && (p = strstr(p, word)); p += n)
        if ((p == text || isspace(p[-1])) && p[n] == '=') { *value = atol(p + n + 1); return 1; }
    return 0;
}
static long told(const char *word, long otherwise) {
    static __thread char text[4096];
    const char *path = getenv("FAKE_CUDA_FILE");
    FILE *f = path ? fopen(path, "r") : NULL;
    if (f) {
        text[fread(text, 1, sizeof text - 1, f)] = 0;
        fclose(f);
        if (in(text, word, &otherwise)) return otherwise;
    }
    in(getenv("FAKE_CUDA"), word, &otherwise);
    return otherwise;
}
#define CALL(name, ...) int name(__VA_ARGS__) { long code = told(#name, 0); if (code) return (int)code;
typedef uint64_t Pointer;

static long visible(void) {
    const char *mask = getenv("CUDA_VISIBLE_DEVICES");
    long count = told("count", 1), n = 0;
    if (!mask) return count;
    for (const char *p = mask; isdigit(*p) && atol(p) < count; n++) { /* what follows a number that is no device is ignored, as there */
        while (isdigit(*p)) p++;
        if (*p == ',') p++;
    }
    return n;
}
CALL(cuInit, unsigned flags) if (told("hang", 0)) sleep(3600); return visible() ? 0 : 100; }
CALL(cuDriverGetVersion, int *version) *version = (int)told("driver", 13000); return 0; }
CALL(cuDeviceGetCount, int *count) *count = (int)visible(); return 0; }
CALL(cuDeviceGet, int *device, int index) *device = index; return index < visible() ? 0 : 101; }
CALL(cuDeviceGetName, char *name, int size, int device) snprintf(name, size, told("mig", 0) ? "Pretended %d MIG 1g.10gb" : "Pretended %d", device); return 0; }
CALL(cuDeviceGetPCIBusId, char *bus, int size, int device) snprintf(bus, size, "00000000:%02x:00.0", device + 1); return 0; }
CALL(cuDeviceTotalMem_v2, size_t *size, int device) *size = (size_t)told("total", 16384) << 20; return 0; }
CALL(cuDeviceGetAttribute, int *value, int what, int device)
    long capability = told("capability", 90);
    *value = what == 75 ? (int)capability / 10 : what == 76 ? (int)capability % 10 : 0;
    return 0; }
CALL(cuDevicePrimaryCtxRetain, void **context, int device) *context = (void *)1; return 0; }
CALL(cuDevicePrimaryCtxRelease_v2, int device) return 0; }
CALL(cuCtxPushCurrent_v2, void *context) return 0; }
CALL(cuCtxPopCurrent_v2, void **context) return 0; }
CALL(cuThreadExchangeStreamCaptureMode, int *mode) return 0; }
CALL(cuMemGetInfo_v2, size_t *free, size_t *total) *free = (size_t)told("free", 16000) << 20; *total = (size_t)told("total", 16384) << 20; return 0; }
CALL(cuMemAlloc_v2, Pointer *at, size_t size)
    if (size >> 20 > (size_t)told("most", 16000)) return 2;
    return (*at = (Pointer)calloc(1, size < 1 << 20 ? size : 1)) ? 0 : 2; }
CALL(cuMemFree_v2, Pointer at) free((void *)at); return 0; }
CALL(cuStreamCreate, void **stream, unsigned flags) *stream = (void *)1; return flags == 1 ? 0 : 1; }
CALL(cuStreamSynchronize, void *stream) if (told("hang", 0)) sleep(3600); return 0; }
CALL(cuModuleLoadData, void **module, const char *text)
    *module = (void *)1;
    return strncmp(text, ".version", 8) || !strstr(text, ".entry") ? 200 : 0; }
CALL(cuModuleGetFunction, void **function, void *module, const char *name) *function = (void *)1; return strcmp(name, "probe") ? 500 : 0; }
CALL(cuMemcpyHtoDAsync_v2, Pointer to, const void *from, size_t size, void *stream) memcpy((void *)to, from, size); return 0; }
CALL(cuMemcpyDtoHAsync_v2, void *to, Pointer from, size_t size, void *stream) memcpy(to, (void *)from, size); return 0; }
CALL(cuLaunchKernel, void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
     void **arguments, void **extra)
    float *y = (float *)*(Pointer *)arguments[0], *x = (float *)*(Pointer *)arguments[1], a = *(float *)arguments[2];
    unsigned n = *(unsigned *)arguments[3];
    if (gx * bx < n) n = gx * bx;
    if (told("idle", 0)) return 0; /* says that it ran, and did nothing */
    for (unsigned i = 0; i < n; i++) y[i] += a * x[i];
    if (told("wrong", 0)) y[n / 2] += 1;
    return 0; }

/* libnvidia-ml.so.1 */
CALL(nvmlInit_v2, void) return 0; }
CALL(nvmlDeviceGetCount_v2, unsigned *count) *count = (unsigned)told("count", 1); return 0; }
CALL(nvmlDeviceGetHandleByIndex_v2, unsigned index, void **device) *device = (void *)(uintptr_t)(index + 1); return 0; }
CALL(nvmlDeviceGetHandleByPciBusId_v2, const char *bus, void **device) *device = (void *)1; return 0; }
CALL(nvmlDeviceGetMigMode, void *device, unsigned *now, unsigned *later) *now = *later = (unsigned)told("split", 0); return 0; }
CALL(nvmlDeviceGetMemoryInfo, void *device, unsigned long long *memory)
    memory[0] = (unsigned long long)told("total", 16384) << 20, memory[1] = (unsigned long long)told("free", 16000) << 20, memory[2] = memory[0] - memory[1];
    return 0; }
CALL(nvmlDeviceGetUtilizationRates, void *device, unsigned *load) load[0] = 97, load[1] = 40; return 0; }
CALL(nvmlDeviceGetTemperature, void *device, int sensor, unsigned *degrees) *degrees = (unsigned)told("heat", 61); return 0; }
CALL(nvmlDeviceGetPowerUsage, void *device, unsigned *milliwatts) *milliwatts = 350000; return 0; }
CALL(nvmlDeviceGetCurrentClocksThrottleReasons, void *device, unsigned long long *reasons) *reasons = (unsigned long long)told("throttled", 1); return 0; }
CALL(nvmlDeviceGetTotalEccErrors, void *device, int uncorrected, int lifetime, unsigned long long *errors) *errors = (unsigned long long)told("ecc", 0); return 0; }
