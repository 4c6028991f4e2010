/* parity [--no-guard-pages] [ISA...]
 *
 * Checks every instruction set this CPU has; one line each. Fails on any mismatch, when a named
 * ISA did not run, and when the first named one is not what dispatch chose. */
#include <stdio.h>
#include <string.h>

#include "../../csrc/dispatch.h"
#include "harness.h"

static int report(const char *name)
{
    printf("isa %s: %zu cases, %zu failures (slots: %zu own, %zu inherited, %zu empty)\n", name,
           counts.cases, counts.failures, counts.own, counts.inherited, counts.empty);
    if (tested == reference)
        printf("digest %016llx\n", (unsigned long long)counts.digest);
    fflush(stdout);
    return counts.failures != 0;
}

static int check_isa(const char *name)
{
    qk_set_isa("reference");
    reference = qk_active_kernels();
    qk_set_isa(name);
    tested = qk_active_kernels();
    counts = (tally){.digest = 0xcbf29ce484222325u};
    if (strcmp(qk_active_isa(), name) != 0)
        fail("asked for %s, got %s", name, qk_active_isa());
    check_quantize();
    check_pack();
    check_linear();
    check_calls();
    return report(name);
}

/* Expected names that this CPU and build do not offer, or that dispatch does not prefer. */
static int check_expected(int names, char **name)
{
    int missing = 0;
    for (int i = 0; i < names; i++) {
        int found = 0;
        for (size_t index = 0; qk_isa_name(index); index++)
            found |= strcmp(name[i], qk_isa_name(index)) == 0;
        if (!found)
            printf("isa %s: expected, but not to be had here\n", name[i]);
        missing |= !found;
    }
    if (names && strcmp(name[0], qk_active_isa()) != 0) {
        printf("isa %s: expected to be chosen, but %s was\n", name[0], qk_active_isa());
        missing = 1;
    }
    return missing;
}

int main(int argc, char **argv)
{
    int first = argc > 1 && strcmp(argv[1], "--no-guard-pages") == 0 ? 2 : 1;
    use_guard_pages(first == 1);
    show_faults();
    int failed = check_expected(argc - first, argv + first);
    for (size_t index = 0; qk_isa_name(index); index++)
        failed |= check_isa(qk_isa_name(index));
    return failed;
}
