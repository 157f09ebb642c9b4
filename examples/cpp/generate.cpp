// Generate tokens with a package that `flexdga.export(model, tokens, "model.pt2", decode=CAPACITY)`
// wrote, by libtorch alone:
//
//     generate model.pt2 COUNT TOKEN TOKEN ...
//
// prints the prompt's token ids and COUNT more, the likeliest each time.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: " << argv[0] << " PACKAGE COUNT TOKEN TOKEN ...\n";
    return 2;
  }
  try {
    const torch::InferenceMode guard;
    const std::string package = argv[1];
    const int count = std::stoi(argv[2]);
    std::vector<int64_t> prompt;
    for (int i = 3; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));

    AOTIModelPackageLoader prefill(package, "prefill");
    AOTIModelPackageLoader decode(package, "decode");

    torch::Tensor tokens = torch::tensor(prompt, torch::kInt64).unsqueeze(0);
    // Logits, then what the prompt left: with a token in place of the logits they are the step's
    // arguments, which it changes in place.
    std::vector<torch::Tensor> arguments = prefill.run({tokens});
    torch::Tensor logits = arguments[0];
    for (int i = 0; i < count; ++i) {
      arguments[0] = logits.argmax(-1);
      tokens = torch::cat({tokens, arguments[0]}, 1);
      logits = decode.run(arguments)[0];
    }
    for (int64_t i = 0; i < tokens.size(1); ++i) std::cout << tokens[0][i].item<int64_t>() << ' ';
    std::cout << '\n';
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
