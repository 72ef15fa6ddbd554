// Loads a GGUF file with llama.cpp, without a GPU, and answers what the request asks.
//
//   node llama_cpp.mjs PACKAGE REQUEST
//
// PACKAGE is the folder of node-llama-cpp, REQUEST a JSON file: `model`, and where wanted `texts` (to tokenize),
// `tokens` (for the negative log-likelihood of each but the first, given those before) and `chat` (a message to answer).
// Prints one JSON object.

import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, requestFile] = process.argv.slice(2);
const {getLlama, JinjaTemplateChatWrapper, LlamaChatSession} = await import(
    pathToFileURL(join(folder, "dist", "index.js")).href
);
const request = JSON.parse(readFileSync(requestFile, "utf8"));
const log = [];
const answer = {};

async function negativeLogLikelihoods(sequence, tokens) {
    const everyToken = {temperature: 1, topK: 0, topP: 1, minP: 0};
    const input = tokens.slice(0, -1).map((token, i) => [token, {
        generateNext: {
            logits: {filter: {tokens: [tokens[i + 1]], includeTop: 1}},
            totalLogitWeight: true,
            options: everyToken
        }
    }]);
    const output = await sequence.controlledEvaluate(input);
    return output.map(({next}, i) =>
        Math.max(...next.logits.values()) + Math.log(next.totalLogitWeight) - next.logits.get(tokens[i + 1])
    );
}

try {
    const llama = await getLlama({
        gpu: false, build: "never", maxThreads: Number(process.env.OMP_NUM_THREADS ?? 2),
        logger: (level, message) => log.push(message)
    });
    const model = await llama.loadModel({modelPath: request.model});
    const metadata = model.fileInfo.metadata;
    answer.build = llama.llamaCppRelease.release;
    answer.template = metadata.tokenizer.chat_template ?? null;
    if (request.texts)
        answer.texts = request.texts.map((text) => model.tokenize(text, true));
    if (request.tokens) {
        const context = await model.createContext({contextSize: request.tokens.length + 8, flashAttention: false});
        answer.nll = await negativeLogLikelihoods(context.getSequence(), request.tokens);
        await context.dispose();
    }
    if (request.chat) {
        const context = await model.createContext({contextSize: 512});
        const chatWrapper = new JinjaTemplateChatWrapper({template: answer.template});
        const session = new LlamaChatSession({contextSequence: context.getSequence(), chatWrapper});
        answer.reply = await session.prompt(request.chat, {temperature: 0, maxTokens: 24});
    }
} catch (error) {
    answer.error = String(error.message ?? error);
    answer.log = log.join("").slice(-2000);
}
console.log(JSON.stringify(answer));
process.exit(0);
