#include "loader_door.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	door_try(data, size, "multiboot");
	door_try(data, size, "multiboot2");
	return 0;
}
