#include "api/dispatch.h"

#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define QK_CPU(feature) __builtin_cpu_supports(feature)
#else
#define QK_CPU(feature) 0
#endif

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <cpuid.h>
/* gcc before 11 has no "f16c" for __builtin_cpu_supports; AVX2's operating-system check covers it.
 */
static int cpu_has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#define QK_CPU_F16C cpu_has_f16c()
#else
#define QK_CPU_F16C 0
#endif

enum {
#define QK_ISA(name, runs) ISA_##name,
#include "kernels/isa_list.def"
#undef QK_ISA
    ISAS
};

static const char *const names[ISAS] = {
#define QK_ISA(name, runs) [ISA_##name] = #name,
#include "kernels/isa_list.def"
#undef QK_ISA
};

static void (*const use[ISAS])(qk_kernels *) = {
#define QK_ISA(name, runs) [ISA_##name] = qk_use_##name,
#include "kernels/isa_list.def"
#undef QK_ISA
};

static qk_kernels tables[ISAS];
static int supported[ISAS];
static int active = -1;

/* Fill a table for each instruction set the CPU runs: its own kernels over those of the rows below.
 * Called before any thread of ours exists (the module's initialisation). */
static void detect(void)
{
    if (active >= 0)
        return;
#define QK_ISA(name, runs) supported[ISA_##name] = (runs) ? 1 : 0;
#include "kernels/isa_list.def"
#undef QK_ISA
    qk_kernels table;
    memset(&table, 0, sizeof table);
    for (int isa = ISAS; isa-- > 0;) {
        if (!supported[isa])
            continue;
        use[isa](&table);
        tables[isa] = table;
        active = isa;
    }
}

const qk_kernels *qk_active_kernels(void)
{
    detect();
    return &tables[active];
}

const char *qk_active_isa(void)
{
    detect();
    return names[active];
}

const char *qk_isa_name(size_t index)
{
    detect();
    for (int isa = 0; isa < ISAS; isa++)
        if (supported[isa] && index-- == 0)
            return names[isa];
    return NULL;
}

qk_status qk_set_isa(const char *name)
{
    detect();
    for (int isa = 0; isa < ISAS; isa++) {
        if (strcmp(name, names[isa]) == 0 && supported[isa]) {
            active = isa;
            return QK_OK;
        }
    }
    return QK_BAD_ISA;
}
