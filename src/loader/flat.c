#include <errno.h>
#include "formats.h"
#include "place.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * A flat binary carries nothing that tells it from data: it is chosen by its --kernel-entry word,
 * or by --load-address when nothing else was recognised.
 */
#define FLAT16_DEFAULT 0x7c00ull /* where a BIOS puts a boot sector */
#define FLAT16_LOW     0x600ull /* past the interrupt table and the BIOS data area */
#define FLAT_DEFAULT   0x100000ull

static int flat_probe(struct image *img, struct error *err)
{
	(void)err;
	return img->entry != ENTRY_AUTO || img->cfg->has_load_address;
}

static enum boot_protocol flat_protocol(const struct image *img)
{
	switch (img->entry) {
	case ENTRY_FLAT16:
		return BOOT_FLAT16;
	case ENTRY_FLAT64:
		return BOOT_FLAT64;
	case ENTRY_FLAT32:
		return BOOT_FLAT32;
	case ENTRY_AUTO:
	case ENTRY_UNPACK:
	case ENTRY_BZIMAGE:
	case ENTRY_BZIMAGE32:
	case ENTRY_PVH:
	case ENTRY_LINUX64:
	case ENTRY_MULTIBOOT:
	case ENTRY_MULTIBOOT2:
	case ENTRY_COUNT:
		break;
	}
	/* Unsaid: the mode a CPU wakes up in, where that reaches the address. */
	return img->cfg->load_address < FLAT_DEFAULT ? BOOT_FLAT16 : BOOT_FLAT32;
}

/* Real mode needs none of the boot structures, so it may use the RAM they would be in. */
static int flat16_check(const struct segment *g, struct error *err)
{
	if (g->gpa < FLAT16_LOW || g->gpa >= PLACE_BIOS || g->memsz > PLACE_BIOS - g->gpa)
		return error_set(err, EINVAL,
			"a 16-bit flat binary of %llu bytes at 0x%llx does not lie in "
			"0x%llx-0x%llx: choose another --load-address",
			(unsigned long long)g->memsz, (unsigned long long)g->gpa, FLAT16_LOW,
			PLACE_BIOS);
	return 0;
}

static const char *flat_bits(enum boot_protocol protocol)
{
	if (protocol == BOOT_FLAT16)
		return "16";
	return protocol == BOOT_FLAT32 ? "32" : "64";
}

static int flat_load(
	struct image *img, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	enum boot_protocol protocol = flat_protocol(img);
	gpa_t at = protocol == BOOT_FLAT16 ? FLAT16_DEFAULT : FLAT_DEFAULT;
	struct segments s = { 0 };
	int r;

	if (img->cfg->has_load_address)
		at = img->cfg->load_address;
	s.nr = 1;
	s.seg[0] = (struct segment){ .filesz = img->src.size, .gpa = at, .memsz = img->src.size };
	r = protocol == BOOT_FLAT16 ? flat16_check(&s.seg[0], err)
				    : segments_check(&s, &img->src, err);
	if (!r)
		r = segments_fit(&s, mem, err);
	if (!r)
		r = segments_load(&s, &img->src, mem, err);
	if (r < 0)
		return r;
	out->protocol = protocol;
	out->entry = out->load_start = at;
	out->load_end = at + img->src.size;
	format_set(out, "flat binary, %s-bit, at 0x%llx", flat_bits(protocol),
		(unsigned long long)at);
	return 0;
}

const struct loader_class flat_loader = {
	.name = "a flat binary",
	.entries = 1u << ENTRY_AUTO | 1u << ENTRY_FLAT16 | 1u << ENTRY_FLAT32 | 1u << ENTRY_FLAT64,
	.probe = flat_probe,
	.load = flat_load,
};
