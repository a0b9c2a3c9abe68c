// Runs CUDA source on the host: every thread of a block is a fibre.
//
// A fibre runs until it waits for others: at a barrier for every fibre of its block that still
// runs, in a warp operation for the other lanes. What a kernel must not do - read behind its shared
// memory, come to a warp operation with some lanes only - ends the run with a message.
#pragma once
#include "emulator_types.hpp"
// The order matters: each of these uses those before it.
#include "emulator_threads.hpp"
#include "emulator_shared.hpp"
#include "emulator_warp.hpp"
#include "emulator_copies.hpp"
#include "emulator_run.hpp"
