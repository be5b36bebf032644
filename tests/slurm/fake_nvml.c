/* fake libnvidia-ml.so.1: answers from the text file $FAKE_NVML ("key value" lines, re-read on each
 * call; keys: count, <gpu>.temp, <gpu>.ecc, <gpu>.remap_unc, ..., <gpu>.lost, <gpu>.hang).  Xid events: lines
 * "<gpu> <xid>" appended to $FAKE_NVML.xid. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
typedef int ret; typedef struct { long idx; } *dev; typedef unsigned long long u64;
enum { OK = 0, UNINIT = 1, INVAL = 2, NOSUPPORT = 3, TIMEOUT = 10, LOST = 15 };
static struct { long idx; } devs[16]; static int inited; static long xidpos;
static const char *path(void) { const char *p = getenv("FAKE_NVML"); return p ? p : "/mnt/fake_nvml"; }
static long long get(const char *key, long long dflt) {
    FILE *f = fopen(path(), "r"); char k[64]; long long v, r = dflt;
    if (f) { while (fscanf(f, "%63s %lli", k, &v) == 2) if (!strcmp(k, key)) r = v; fclose(f); }
    return r;
}
static long long dget(dev d, const char *key, long long dflt) {
    char k[64]; snprintf(k, sizeof k, "%ld.%s", d->idx, key); return get(k, dflt);
}
/* Of the GPU, in all nodes: "node" is theirs. */
static long long number(dev d) { return 100 * get("node", 0) + d->idx; }
#define GUARD(d) do { while (dget(d, "hang", 0)) usleep(10000); if (!inited) return UNINIT; if (dget(d, "lost", 0)) return LOST; } while (0)
ret nvmlInitWithFlags(unsigned f) { (void)f; inited = 1; return get("init_rc", OK); }
ret nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
ret nvmlShutdown(void) { inited = 0; return OK; }
const char *nvmlErrorString(ret r) { return r == LOST ? "GPU is lost" : r == UNINIT ? "Uninitialized" : "fake error"; }
ret nvmlSystemGetDriverVersion(char *s, unsigned n) { snprintf(s, n, "999.99"); return OK; }
ret nvmlDeviceGetCount_v2(unsigned *n) { if (!inited) return UNINIT; *n = get("count", 8); return OK; }
ret nvmlDeviceGetHandleByIndex_v2(unsigned i, dev *d) {
    if (!inited) return UNINIT; if (i >= get("count", 8)) return INVAL;
    devs[i].idx = i; while (dget((dev)&devs[i], "hang", 0)) usleep(10000); *d = (dev)&devs[i]; return dget(*d, "lost", 0) ? LOST : OK;
}
ret nvmlDeviceGetIndex(dev d, unsigned *i) { *i = d->idx; return OK; }
ret nvmlDeviceGetUUID(dev d, char *s, unsigned n) { snprintf(s, n, "GPU-fake-%04lld", number(d)); return OK; }
ret nvmlDeviceGetSerial(dev d, char *s, unsigned n) {
    GUARD(d); if (dget(d, "no_serial", 0)) return NOSUPPORT; snprintf(s, n, "13225%08lld", number(d)); return OK;
}
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
ret nvmlDeviceGetPciInfo_v3(dev d, struct pci *p) {
    GUARD(d); memset(p, 0, sizeof *p); p->bus = 0x3b + d->idx;
    snprintf(p->bus_id, sizeof p->bus_id, "00000000:%02X:00.0", p->bus); return OK;
}
ret nvmlDeviceGetName(dev d, char *s, unsigned n) { (void)d; snprintf(s, n, "NVIDIA FAKE"); return OK; }
ret nvmlDeviceGetTemperature(dev d, int sensor, unsigned *t) { (void)sensor; GUARD(d); *t = dget(d, "temp", 40); return OK; }
ret nvmlDeviceGetTotalEccErrors(dev d, int type, int counter, u64 *n) {   /* type 0 corrected, 1 uncorrected */
    (void)counter; GUARD(d); *n = dget(d, type ? "ecc" : "ecc_corr", 0); return OK;
}
ret nvmlDeviceGetMemoryErrorCounter(dev d, int type, int counter, int loc, u64 *n) { (void)loc; return nvmlDeviceGetTotalEccErrors(d, type, counter, n); }
ret nvmlDeviceGetRemappedRows(dev d, unsigned *corr, unsigned *unc, unsigned *pend, unsigned *fail) {
    GUARD(d); *corr = dget(d, "remap_corr", 0); *unc = dget(d, "remap_unc", 0);
    *pend = dget(d, "remap_pending", 0); *fail = dget(d, "remap_fail", 0); return OK;
}
struct ev { dev device; u64 type, data; unsigned gi, ci; };
ret nvmlEventSetCreate(void **s) { *s = calloc(1, 8); return OK; }
ret nvmlEventSetFree(void *s) { free(s); return OK; }
ret nvmlDeviceGetSupportedEventTypes(dev d, u64 *t) { GUARD(d); *t = 0xf; return OK; }
ret nvmlDeviceRegisterEvents(dev d, u64 types, void *set) { (void)types; (void)set; GUARD(d); return OK; }
ret nvmlEventSetWait_v2(void *set, struct ev *e, unsigned ms) {
    char p[4096]; long i, x; (void)set; snprintf(p, sizeof p, "%s.xid", path());
    for (unsigned t = 0; ; t += 10) {
        FILE *f = fopen(p, "r");
        if (f) { fseek(f, xidpos, SEEK_SET);
            if (fscanf(f, "%ld %ld\n", &i, &x) == 2) { xidpos = ftell(f); fclose(f); devs[i].idx = i;
                *e = (struct ev){(dev)&devs[i], 8 /* XidCriticalError */, x, ~0u, ~0u}; return OK; }
            fclose(f); }
        if (t >= ms) return TIMEOUT;
        usleep(10000);
    }
}
