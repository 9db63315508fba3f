#include "loader_door.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	door_try(data, size, "auto");
	door_try(data, size, "linux64");
	return 0;
}
