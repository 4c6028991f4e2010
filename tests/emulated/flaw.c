/* Kernels with a deliberate flaw: what the harness must see. */
#include <string.h>

#include "harness.h"

static void wrong_value(uint8_t *packed, const uint8_t *codes, size_t count)
{
    reference->pack_ternary(packed, codes, count);
    packed[(count - 1) / 5] ^= count == 97;
}

static void write_past_end(uint8_t *packed, const uint8_t *codes, size_t count)
{
    reference->pack_ternary(packed, codes, count);
    packed[(count + 4) / 5] = 0;
}

static void read_past_end(uint8_t *packed, const uint8_t *codes, size_t count)
{
    volatile uint8_t next = codes[count];
    (void)next;
    reference->pack_ternary(packed, codes, count);
}

int apply_flaw(qk_kernels *table, const char *name)
{
    if (strcmp(name, "value") == 0)
        table->pack_ternary = wrong_value;
    else if (strcmp(name, "overrun") == 0)
        table->pack_ternary = write_past_end;
    else if (strcmp(name, "overread") == 0)
        table->pack_ternary = read_past_end;
    else
        return 0;
    return 1;
}
