/* A VMDK image; what follows "\0--\n" in the input is the file behind each extent that its descriptor names. */
#include "image_door.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint8_t *rest;
static size_t rest_size;

static int give(const struct image_opener *o, const char *name, const char *from, struct error *err)
{
	(void)o;
	(void)from;
	(void)err;
	assert(!strchr(name, '/') && !strncmp(name, "disk-", 5));
	return door_file(rest, rest_size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const struct image_opener opener = { give };
	const uint8_t *cut;

	log_set_level(LOG_ERROR);
	cut = size && *data == '#' ? memmem(data, size, "\0--\n", 4) : NULL;
	rest = cut ? cut + 4 : data + size;
	rest_size = (size_t)(data + size - rest);
	door_try("vmdk", door_file(data, cut ? (size_t)(cut - data) : size), &opener);
	return 0;
}
