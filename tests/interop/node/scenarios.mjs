// Runs named scenarios one after the other and prints one JSON object {name: result | {error}} for pytest to judge.
// The target comes from the environment: BASE_URL (with /v1) and API_KEY.

export const baseURL = process.env.BASE_URL;
export const apiKey = process.env.API_KEY;

export const tools = ["get_weather", "get_time"].map((name) => ({
  type: "function",
  function: {
    name,
    description: `Calls ${name}.`,
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}));

/** What an SDK threw, as plain data: its class, status and code, never its stack. */
export function describe(error) {
  return {
    class: error?.constructor?.name ?? typeof error,
    name: error?.name,
    status: error?.status ?? error?.statusCode ?? null,
    code: error?.code ?? error?.data?.error?.code ?? null,
    message: String(error?.message ?? error),
  };
}

export async function thrown(call) {
  try {
    return { unexpected: await call() };
  } catch (error) {
    return describe(error);
  }
}

export async function run(scenarios) {
  const results = {};
  for (const [name, scenario] of Object.entries(scenarios)) {
    try {
      results[name] = await scenario();
    } catch (error) {
      results[name] = { error: describe(error) };
    }
  }
  process.stdout.write(JSON.stringify(results));
}
