// Reads files as the wrapper does, for tests: commands on stdin, one answer a line.
#include <iostream>
#include <string>

#include "tvm_sparse/manifest.hpp"
#include "tvm_sparse/npy.hpp"

int main() {
  std::string command, path, to;
  while (std::getline(std::cin, command) && std::getline(std::cin, path)) {
    if (command == "copy") std::getline(std::cin, to);
    try {
      if (command == "copy") {
        tvm_sparse::write_npy(to, tvm_sparse::read_npy(path));
        std::cout << "ok" << std::endl;
      } else {
        const tvm_sparse::Manifest found = tvm_sparse::read_manifest(path);
        std::cout << "ok";
        for (const tvm_sparse::TensorSpec& spec : found.inputs)
          std::cout << " | " << tvm_sparse::describe(spec);
        std::cout << std::endl;
      }
    } catch (const tvm_sparse::Error& error) {
      std::cout << "error: " << error.what() << std::endl;
    }
  }
}
