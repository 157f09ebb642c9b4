// Says of three prompts whether the package at argv[1] takes them: one of another dtype, one whose
// rows do not lie one after the other, and one cut from a longer row, which is contiguous.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const torch::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader prefill(argv[1], "prefill");
  const torch::Tensor tokens = torch::zeros({2, 300}, torch::kInt64);
  for (const torch::Tensor& prompt :
       {tokens.to(torch::kInt32), tokens.t().contiguous().t(), tokens.narrow(0, 0, 1).narrow(1, 0, 200)}) {
    try {
      std::cout << prefill.run({prompt})[0].size(0) << " taken\n";
    } catch (const std::exception&) {
      std::cout << "refused\n";
    }
  }
  return 0;
}
