/* vmm disk replay by itself. */
#include "cli/replay.h"

int main(int argc, char **argv)
{
	return disk_replay(argc - 1, argv + 1);
}
