/* parity [--no-guard-pages] [--flaw=NAME] [ISA...]
 *
 * Checks every instruction set this CPU has; one line each. Fails on any mismatch, when a named
 * ISA did not run, and when the first named one is not what dispatch chose. A flaw replaces a
 * kernel of the reference by a bad one, and all must fail. */
#include <stdio.h>
#include <string.h>

#include "api/dispatch.h"
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
    check_fit();
    check_pack();
    check_linear();
    check_packed();
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

static int check_flaw(const char *name)
{
    static qk_kernels flawed;
    qk_set_isa("reference");
    reference = qk_active_kernels();
    flawed = *reference;
    tested = &flawed;
    if (!apply_flaw(&flawed, name))
        fail("no flaw is called %s", name);
    check_pack();
    return report(name);
}

int main(int argc, char **argv)
{
    const char *flaw = NULL;
    int first = 1;
    for (; first < argc && strncmp(argv[first], "--", 2) == 0; first++) {
        if (strncmp(argv[first], "--flaw=", 7) == 0)
            flaw = argv[first] + 7;
        else
            use_guard_pages(0);
    }
    show_faults();
    if (flaw)
        return check_flaw(flaw);
    int failed = check_expected(argc - first, argv + first);
    for (size_t index = 0; qk_isa_name(index); index++)
        failed |= check_isa(qk_isa_name(index));
    return failed;
}
